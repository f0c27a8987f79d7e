"""The device half: KV cache, buckets, sampler and the runner of the steps."""

from jaxserve.runner.blueprint import code_versions as code_versions
from jaxserve.runner.config import RunnerConfig as RunnerConfig
from jaxserve.runner.executor import Executor as Executor
from jaxserve.runner.hosts import Hosts as Hosts
from jaxserve.runner.hosts import start_jax as start_jax
from jaxserve.runner.memory import peak_memory as peak_memory
from jaxserve.runner.mesh import make_mesh as make_mesh
from jaxserve.runner.model_runner import ModelRunner as ModelRunner
from jaxserve.runner.preparation import Preparation as Preparation
