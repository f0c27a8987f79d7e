"""A client of OpenAI's streaming routes, for `jaxserve chat` and `jaxserve bench serve`.

On aiohttp because a benchmark's client must not be what is measured: it read 33,000 to 45,000 events a CPU-second where httpx read 17,000.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from jaxserve.errors import JaxserveError

DONE = b"[DONE]"


class ServerError(JaxserveError):
    """The server cannot be reached, refused a request or broke a stream off; the message is one line."""


class Client:
    """Speaks with one server; made by `connect`.

    Args:
        url: of the server, without a path or with one that ends before /v1.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str):
        self._session = session
        self._url = url.rstrip("/").removesuffix("/v1")

    async def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            ServerError: not reached, not 200, or not JSON.
        """
        with _told(self._url):
            async with self._session.get(self._url + path) as response:
                await _check(response)
                return await response.json(content_type=None)

    async def models(self) -> list[dict[str, Any]]:
        """The models that the server offers: at least one, each with an "id"."""
        try:
            models = (await self.get("/v1/models"))["data"]
            if models[0]["id"]:
                return models
        except (LookupError, TypeError):
            pass
        raise ServerError(f"{self._url}/v1/models names no model")

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """POST a request with "stream": true.

        Yields:
            each event's JSON, up to [DONE]; leaving the loop closes the connection, which cancels the request.

        Raises:
            ServerError: not reached, refused, or the stream ended before [DONE].
        """
        with _told(self._url):
            async with self._session.post(self._url + path, json={**body, "stream": True}) as response:
                await _check(response)
                rest = b""
                async for data in response.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if not line.startswith(b"data:"):
                            continue
                        payload = line[5:].strip()
                        if payload == DONE:
                            return
                        event = json.loads(payload)
                        if "error" in event:
                            raise ServerError(_message(event))
                        yield event
        raise ServerError("the server broke the stream off")


@asynccontextmanager
async def connect(url: str, api_key: str | None = None) -> AsyncIterator[Client]:
    """A client with as many connections as it has requests, and no time limit but 30 s to connect."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout) as session:
        yield Client(session, url)


class _told:
    """Turns what aiohttp raises into a ServerError of one line."""

    def __init__(self, url: str):
        self._url = url

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            raise ServerError(f"no server answers at {self._url}") from None
        if isinstance(error, aiohttp.ClientError | TimeoutError | ConnectionError):
            raise ServerError(f"the connection to {self._url} broke: {error or type(error).__name__}") from None
        if isinstance(error, ValueError):
            raise ServerError(f"{self._url} answered with something that is not JSON") from None


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = await response.text()
    try:
        message = _message(json.loads(text))
    except ValueError:
        message = text.strip().splitlines()[0][:200] if text.strip() else response.reason or ""
    raise ServerError(f"{response.status}: {message}")


def _message(body: Any) -> str:
    """The message of an error body: OpenAI's shape, TGI's, or anything else as it is."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)
