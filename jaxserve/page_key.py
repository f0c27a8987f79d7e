"""The names of KV pages: by them a scheduler finds what it holds, and a router who holds it."""

import struct
from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256

from jaxserve.request import Request

ROOT = bytes(32)  # the parent of a first page


def page_key(parent: bytes, tokens: bytes, extras: bytes) -> bytes:
    """Name a full page's content by all that its K/V depends on.

    Args:
        parent: key of the page before it, ROOT for a first page (32 bytes).
        tokens: its token ids as int32; always one page's worth, so that where the extras begin is never in doubt.
        extras: what else the K/V depends on, and who may share it (request_extras).

    Returns:
        the SHA-256 of the three, 32 bytes: unlike Python's hash() nobody can make two prompts collide.
    """
    return sha256(parent + tokens + extras).digest()


def short_names(keys: Iterable[bytes]) -> list[int]:
    """Return pages' names between processes, where a rare mistake costs little: the first 8 bytes of each key, little-endian."""
    return [name for (name,) in struct.iter_unpack("<Q24x", b"".join(keys))]


def request_extras(request: Request) -> bytes:
    """Return the part of a request's page keys that is not tokens: its adapter and its salt."""
    return f"{len(request.adapter)}:{request.adapter}{request.cache_salt}".encode("utf-8", "surrogatepass")


def extend_keys(keys: list[bytes], request: Request, token_ids: Sequence[int], page_size: int, num_pages: int) -> None:
    """Append the keys of a sample's pages up to num_pages, all of whose tokens are known.

    Args:
        keys: of its first pages, in order.
        page_size: tokens a page.
    """
    first = len(keys)
    if first >= num_pages:
        return
    tokens = array("i", token_ids[first * page_size : num_pages * page_size]).tobytes()
    extras = request_extras(request)
    parent = keys[-1] if keys else ROOT
    stride = len(tokens) // (num_pages - first)
    for begin in range(0, len(tokens), stride):
        parent = page_key(parent, tokens[begin : begin + stride], extras)
        keys.append(parent)
