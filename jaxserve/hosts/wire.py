"""Calls of programs to and from the messages of worker.proto, and what both ends of the stream tell gRPC."""

import asyncio
import contextlib
import inspect
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import grpc
import numpy as np

from jaxserve.hosts import worker_pb2 as pb

METHOD = "/jaxserve.hosts.Leader/Join"
PING_INTERVAL = 2.0  # seconds
PING_TIMEOUT = 3.0  # seconds; with the interval, so long it takes until a host that is silent counts as lost
LOSS_TIME = PING_INTERVAL + PING_TIMEOUT + 2.0  # seconds until a loss is known for sure
JOIN_TIME = 600.0  # seconds until all hosts must be there

# A connection is watched, and is direct whatever the environment says of proxies.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", int(PING_INTERVAL * 1000)),
    ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT * 1000)),
    ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT * 1000)),  # else a minute, and it goes before
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)

_DTYPES = {"int32": pb.Array.INT32, "uint32": pb.Array.UINT32}
_FROM_WIRE = {pb.Array.INT32: np.dtype("<i4"), pb.Array.UINT32: np.dtype("<u4")}


def own_version() -> str:
    """The version of jaxserve, which all hosts must have."""
    with contextlib.suppress(PackageNotFoundError):
        return version("jaxserve")
    return "unknown"


async def stop_server(server: grpc.aio.Server, grace: float) -> None:
    """Stop a gRPC server for good: its calls have `grace` seconds to end, and what gRPC has yet to do for them as many again.

    `Server.stop` returns while gRPC's own tasks of these calls still wait for their last events. With the event loop they would be
    cancelled, which gRPC logs as an error with a traceback. They are known by being compiled: no coroutine of Python's.
    """
    await server.stop(grace)
    if compiled := [task for task in asyncio.all_tasks() if not inspect.iscoroutine(task.get_coro())]:
        await asyncio.wait(compiled, timeout=grace)


def call_message(program: str, arrays: Sequence[np.ndarray]) -> pb.LeaderMessage:
    """A call; arrays are int32 or uint32."""
    parts = [pb.Array(dtype=_DTYPES[array.dtype.name], shape=array.shape, content=array.tobytes()) for array in arrays]
    return pb.LeaderMessage(call=pb.Call(program=program, arrays=parts))


def call_from(message: pb.Call) -> tuple[str, list[np.ndarray]]:
    """The program and the arrays of a call."""
    arrays = [np.frombuffer(part.content, _FROM_WIRE[part.dtype]).reshape(tuple(part.shape)) for part in message.arrays]
    return message.program, arrays
