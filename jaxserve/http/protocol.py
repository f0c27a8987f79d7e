"""HTTP/1.1 with the limits that uvicorn lacks: on connections, headers, the time a request takes to arrive, clients that do not read.

uvicorn takes headers of megabytes and waits for ever for half a request or for a client that does not read.
"""

import asyncio
import logging
import sys
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65536
HEAD_TIMEOUT = 10.0  # seconds from the first byte, or from connecting, to the end of the headers
BODY_TIMEOUT = 60.0  # seconds from there to the end of the body
STALL_TIMEOUT = 30.0  # seconds that written data may wait for the client to read
# A chunked body of small chunks is longer on the wire than what it carries.
MAX_CHUNKED_OVERHEAD = 8
MAX_CONNECTIONS = 8192  # of an http process
LINGER_TIME = 1.0  # seconds that a refused client may go on sending without a reset that would swallow the answer
RETRY_AFTER = 5  # seconds, where there are too many connections


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections that exceed a limit; 431 or 408 where a response can still be sent.

    Args:
        payload_limit: bytes of a body that the application takes; it answers 413 itself. Only what goes far beyond is cut off here.
        max_connections: of this process; None: MAX_CONNECTIONS.
    """

    def __init__(self, *args: Any, payload_limit: int, max_connections: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_connections = MAX_CONNECTIONS if max_connections is None else max_connections
        self._payload_limit = payload_limit
        self._most_bytes = MAX_HEAD_BYTES + MAX_CHUNKED_OVERHEAD * payload_limit
        # Of the connection.
        self._stall_timer: asyncio.TimerHandle | None = None
        # Of the request that is arriving.
        self._receive_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._num_bytes = 0
        self._refused = False
        # Of a request to upgrade.
        self._asks_upgrade = False
        self._rest_at: int | None = None  # where the data that was parsed last goes on behind its head
        self._resuming = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self._refuse(b"503 Service Unavailable\r\nretry-after: %d" % RETRY_AFTER)
        else:
            self._arm_receive_timer(HEAD_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm_receive_timer()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._refused:
            if self._num_bytes > self._most_bytes:
                self.transport.abort()
            return
        if self._receive_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._arm_receive_timer(HEAD_TIMEOUT)
        super().data_received(data)
        rest = memoryview(data)
        while self._rest_at is not None and not self._refused:
            rest = rest[self._rest_at :]
            self._rest_at = None
            self._resume_after_upgrade()
            super().data_received(rest)  # type: ignore[arg-type]  httptools takes a memoryview
        if self._in_head and self._num_bytes > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")
        elif self._num_bytes > self._most_bytes:
            self.transport.abort()

    def on_message_begin(self) -> None:
        if self._resuming:
            return
        self._in_head = True
        self._arm_receive_timer(HEAD_TIMEOUT)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes after the body is nobody's
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._resuming:
            self._resuming = False
            return
        self._in_head = False
        self._asks_upgrade = self.parser.should_upgrade()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")
        if self._refused:
            return
        self._arm_receive_timer(BODY_TIMEOUT)
        super().on_headers_complete()
        if self._body_may_be_too_large():
            self.cycle.transport = _Lingering(self)  # type: ignore[assignment]  it has what a cycle uses of a transport

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._asks_upgrade:  # the parser takes what follows for another protocol; its body comes yet
            self._asks_upgrade = False
            return
        self._disarm_receive_timer()
        self._in_head = True
        self._num_bytes = 0
        if not self._refused:
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALL_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _unsupported_upgrade_warning(self) -> None:
        """A request to upgrade goes on as if it had not asked, which the server may do (RFC 9110, 7.8); no line in the log, which any
        client could fill. Java's HttpClient asks for h2c with every first request that it sends, bodies and all."""
        upgrade = sys.exception()
        assert isinstance(upgrade, httptools.HttpParserUpgrade)
        self._rest_at = upgrade.args[0]

    def _resume_after_upgrade(self) -> None:
        """The parser is through with the connection: another one takes the body, and the requests after it."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        framing = [name + b": " + value for name, value in self.headers if name in (b"content-length", b"transfer-encoding")]
        self._resuming = True
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", b""]))

    def _body_may_be_too_large(self) -> bool:
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"content-length" and int(value) > self._payload_limit):
                return True
        return False

    def hang_up(self) -> None:
        """Close after what was written; the rest of an unfinished request is read and dropped for a while."""
        if self._in_head and not self._refused:  # nothing is being sent
            self.transport.close()
            return
        self._refused = True
        self._disarm_receive_timer()
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.loop.call_later(LINGER_TIME, self.transport.abort)

    def _arm_receive_timer(self, seconds: float) -> None:
        self._disarm_receive_timer()
        self._receive_timer = self.loop.call_later(seconds, self._timed_out)

    def _disarm_receive_timer(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _timed_out(self) -> None:
        self._receive_timer = None
        if self.pipeline:  # reading is paused until the responses before are complete
            self._arm_receive_timer(BODY_TIMEOUT)
        elif self._num_bytes == 0:
            self.transport.close()
        elif self._in_head:
            self._refuse(b"408 Request Timeout")
        else:  # the application waits for the body; it learns that the client is gone
            self.transport.abort()

    def _refuse(self, status: bytes) -> None:
        self._refused = True
        told = {"status": int(status[:3]), "outcome": "refused"}
        logger.info("refused before a request was read: %s", status.partition(b"\r")[0].decode(), extra={"request": told})
        self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.hang_up()


class _Lingering:
    """A transport whose close() lets a client that still sends read the answer first."""

    def __init__(self, protocol: LimitedProtocol):
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing
        self.close = protocol.hang_up
