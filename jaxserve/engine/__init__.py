"""Requests in, tokens out: the scheduler and the device half, one step after the other."""

from jaxserve.engine.async_engine import AsyncEngine as AsyncEngine
from jaxserve.engine.async_engine import Sink as Sink
from jaxserve.engine.build import build_async_engine as build_async_engine
from jaxserve.engine.build import build_engine as build_engine
from jaxserve.engine.engine import Engine as Engine
from jaxserve.engine.start import build_worker as build_worker
