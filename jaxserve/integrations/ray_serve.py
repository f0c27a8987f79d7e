"""jaxserve as an application of Ray Serve: each replica is an engine and the whole HTTP front end, in one actor and one engine process.

    serve run jaxserve.integrations.ray_serve:app model_id=Qwen/Qwen3-0.6B num_replicas=2

Ray's proxies send requests to replicas, start them again and scale them; this module needs `pip install jaxserve[ray]`.
"""

import contextlib
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from jaxserve.cli.serve import read_options
from jaxserve.config import EngineOptions, ModelOptions, ServerOptions
from jaxserve.errors import StartupError
from jaxserve.http.app import build_app
from jaxserve.http.errors import contain_errors
from jaxserve.http.service import Service
from jaxserve.http.sse import with_direct_send
from jaxserve.launcher.engine_group import EngineGroup
from jaxserve.metrics import Metrics

NAME = "jaxserve"
# Of the HTTP server, which is Ray's here, and of the launcher.
_RAYS_OWN = ("hostname", "port", "http_workers", "prometheus_port", "graceful_termination_timeout")


def app(arguments: Mapping[str, Any]) -> Application:
    """An application for `serve run`, `serve.run` and Serve's config files.

    Args:
        arguments: jaxserve's flags, with or without underscores for dashes (`model_id`, `max-batch-size`); and `num_replicas` (default 1)
            and `num_gpus`, of each replica (default: the devices of its mesh; 0: it computes on the CPU). In a config file the
            deployment's options ("jaxserve": autoscaling_config, ray_actor_options, ...) go before these.

    Raises:
        ValueError: naming the flag that is wrong, or that has no meaning under Ray.
    """
    flags = {name.replace("-", "_"): value for name, value in arguments.items()}
    num_replicas = _count(flags, "num_replicas", 1, least=1)
    model, engine, server = _options(flags)
    num_gpus = _count(flags, "num_gpus", engine.tensor_size, least=0)
    deployment = Replica.options(
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
        # Ray's own default of 5 would keep batches small.
        max_ongoing_requests=engine.max_concurrent_requests,
    )
    return deployment.bind(model, engine, server, {} if num_gpus else {"JAX_PLATFORMS": "cpu"})


def _count(flags: Mapping[str, Any], name: str, default: int, least: int) -> int:
    text = str(flags.get(name, default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}. Given: {text}")
    return int(text)


def _options(flags: Mapping[str, Any]) -> tuple[ModelOptions, EngineOptions, ServerOptions]:
    """Options, read as the command line reads them; the environment of whoever builds the application does not count."""
    given = {name: value for name, value in flags.items() if name not in ("num_replicas", "num_gpus")}
    if wrong := [name for name in _RAYS_OWN if name in given]:
        raise ValueError(f"{wrong[0]} is Ray Serve's to decide")
    words = [f"--{name.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            model, engine, server, hosts = read_options(words, {})
    except SystemExit:
        raise ValueError(told.getvalue().strip()) from None
    if hosts.span_hosts:
        raise ValueError("a replica of Ray Serve has one host; over several hosts start jaxserve itself (docs/kubernetes.md)")
    if engine.data_size > 1:
        raise ValueError(
            f"mesh {engine.mesh}: replicas are Ray Serve's; say mesh=1x{engine.tensor_size} and num_replicas={engine.data_size}"
        )
    return model, engine, server


@serve.deployment(name=NAME, health_check_period_s=5, health_check_timeout_s=30)
@serve.ingress()
class Replica:
    """One replica. Ray builds it where there are resources for it, and again where check_health() fails.

    Args:
        model, engine, server: options; the mesh has one engine.
        environment: variables of the engine process.

    Raises:
        StartupError: the engine cannot start, and why.
    """

    def __init__(self, model: ModelOptions, engine: EngineOptions, server: ServerOptions, environment: Mapping[str, str]):
        self._engines = EngineGroup(model, engine, server, environment=environment)
        router = self._engines.router
        self._service = Service(
            router, Metrics(router.clients, server.served_model_name), server, model.tokenizer_config_path, engine.max_concurrent_requests
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray calls to get the application."""
        return with_direct_send(contain_errors(build_app(self._service, self._lifespan)))

    async def check_health(self) -> None:
        """Raise StartupError where requests cannot be answered; Ray then replaces this replica."""
        if not self._service.ready:
            raise StartupError("the engine has ended")

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        try:
            await self._engines.start()
            await self._service.load_tokenizer()
            await self._service.open()
            yield
        finally:
            self._service.close()
            await self._engines.end()
            self._engines.remove()
