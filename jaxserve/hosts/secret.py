"""How two hosts prove to each other that they know the cluster's secret, without telling it to whoever listens.

Each answers a random challenge of the other's by an HMAC (RFC 2104) over both challenges, keyed by the secret. Who proves what is in it, so
that no proof can be sent back as another.
"""

import hashlib
import hmac
import secrets

CHALLENGE_SIZE = 32  # bytes
MIN_SECRET_LENGTH = 16  # characters: whoever overhears a proof can try out secrets


def new_challenge() -> bytes:
    """A challenge that nobody can foretell."""
    return secrets.token_bytes(CHALLENGE_SIZE)


def proof(
    secret: str | None, prover: int, number: int, callers_challenge: bytes, answerers_challenge: bytes, purpose: str = "hosts"
) -> bytes:
    """What shows that a host knows the secret.

    Args:
        secret: None, on loopback alone, counts as an empty one.
        prover: who proves: the index of a host; of an engine's stream, 0 for the engine and 1 for the http process.
        number: the index of the host that joins; of an engine's stream its replica.
        callers_challenge, answerers_challenge: of this connection, of who opened it and who listens.
        purpose: what the stream is for, so that a proof of one kind is none of another.
    """
    key = (secret or "").encode(errors="surrogatepass")  # variables may hold any bytes, which Python takes for lone surrogates
    said = f"jaxserve {purpose}".encode() + prover.to_bytes(4) + number.to_bytes(4) + callers_challenge + answerers_challenge
    return hmac.digest(key, said, hashlib.sha256)


def is_proof(digest: bytes, expected: bytes) -> bool:
    """Whether a proof is right, in a time that tells nothing."""
    return hmac.compare_digest(digest, expected)
