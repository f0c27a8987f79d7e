"""From a model id to arrays on the devices.

`source` finds the files and imports no JAX, so that front end and launcher can use it; `loader` puts the weights on a mesh.
"""

from jaxserve.weights.source import ModelSource as ModelSource
from jaxserve.weights.source import resolve_model as resolve_model
