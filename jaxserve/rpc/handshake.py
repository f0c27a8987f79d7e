"""How an http process and an engine on another host find out that they know the same secret, before anything else is said.

The engine proves first, so that nothing is sent to who only listens at its address. Another engine that was given its port proves another
replica.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from jaxserve.hosts.secret import is_proof, new_challenge, proof
from jaxserve.rpc import engine_pb2 as pb

HANDSHAKE_TIME = 10.0  # seconds
_ENGINE, _CALLER = 0, 1


@dataclass(frozen=True, slots=True)
class StreamKey:
    """What both ends of a stream between hosts know.

    Attributes:
        secret: of the cluster; None on loopback alone.
        replica: of the engine.
    """

    secret: str | None
    replica: int

    def proof(self, prover: int, callers_challenge: bytes, engines_challenge: bytes) -> bytes:
        """What shows that this end knows it."""
        return proof(self.secret, prover, self.replica, callers_challenge, engines_challenge, "engine")


async def admit(messages: AsyncIterator[pb.ClientMessage], context: Any, key: StreamKey) -> bool:
    """Whether who opened a stream proves to know the key (the engine's end)."""
    try:
        async with asyncio.timeout(HANDSHAKE_TIME):
            callers = (await anext(messages, pb.ClientMessage())).hello.challenge
            own = new_challenge()
            await context.write(pb.EngineMessage(answer=pb.Answer(challenge=own, digest=key.proof(_ENGINE, callers, own))))
            digest = (await anext(messages, pb.ClientMessage())).proof.digest
    except (TimeoutError, DecodeError, grpc.aio.BaseError):
        return False
    return is_proof(digest, key.proof(_CALLER, callers, own))


async def introduce(call: grpc.aio.StreamStreamCall, key: StreamKey) -> bool:
    """Prove to know the key; whether the engine does (the http process's end)."""
    challenge = new_challenge()
    async with asyncio.timeout(HANDSHAKE_TIME):
        await call.write(pb.ClientMessage(hello=pb.Hello(challenge=challenge)))
        message = await call.read()
    if not isinstance(message, pb.EngineMessage):
        return False
    answer = message.answer
    if not is_proof(answer.digest, key.proof(_ENGINE, challenge, answer.challenge)):
        return False
    await call.write(pb.ClientMessage(proof=pb.Proof(digest=key.proof(_CALLER, challenge, answer.challenge))))
    return True
