"""Clients that hang up, do not read, send slowly, send too much: raw sockets against the real protocol, with short time limits."""

import asyncio
import gc
import json
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from live_front_end import LiveFrontEnd
from tiny_models import write_tokenizer

from jaxserve.http import protocol, sse
from jaxserve.rpc import client as rpc_client

SHORT = 0.4  # seconds, in place of the real limits


@pytest.fixture(scope="module")
def short_limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFrontEnd]:
    """A front end whose limits are short and whose engine never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "HEAD_TIMEOUT", SHORT)
        patch.setattr(protocol, "BODY_TIMEOUT", SHORT)
        patch.setattr(protocol, "STALL_TIMEOUT", SHORT)
        patch.setattr(sse, "KEEP_ALIVE_INTERVAL", SHORT)
        patch.setattr(rpc_client, "MAX_UNREAD_OUTPUTS", 500)
        live = LiveFrontEnd(folder, engine={"forever": True, "max_total_tokens": 10**6, "step_seconds": 0.002})
        collected: list[bool] = []
        patch.setattr(gc, "collect", lambda: collected.append(live.service.ready))
        live.start()
        assert collected == [False], "a collection after /health said ready would hold up the first request"
        yield live
        live.stop()


@pytest.fixture(autouse=True)
def _nothing_left(short_limits: LiveFrontEnd) -> Iterator[None]:
    """After each test no request is left in the engine, and the next is served."""
    yield
    assert short_limits.idle(10.0)
    answer = short_limits.client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3, "temperature": 0})
    assert answer.json()["choices"][0]["text"] == "abc"


def _request(stream: bool = True, path: str = "/v1/completions", **fields: object) -> bytes:
    body = json.dumps({"prompt": "abcdefgh", "max_tokens": None if stream else 10**5, "stream": stream, **fields}).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _connect(live: LiveFrontEnd, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", live.port))
    connection.settimeout(10)
    return connection


def _read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def _wait_for_running(live: LiveFrontEnd, count: int) -> None:
    deadline = time.monotonic() + 10
    while live.engine.stats().num_running < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_clients_that_hang_up(short_limits: LiveFrontEnd):
    connections = []
    for _ in range(200):
        connections.append(connection := _connect(short_limits))
        connection.sendall(_request(max_tokens=10**5))  # at once: a head that is late ends the connection
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    _wait_for_running(short_limits, 200)
    for connection in connections:
        connection.close()
    assert short_limits.idle(10.0)


def test_client_that_hangs_up_before_a_whole_answer(short_limits: LiveFrontEnd):
    for path, field in (("/v1/completions", "prompt"), ("/generate", "inputs")):
        connection = _connect(short_limits)
        connection.sendall(_request(False, path, **{field: "abc"}))
        _wait_for_running(short_limits, 1)
        connection.close()
        assert short_limits.idle(5.0)


def test_clients_that_never_read(short_limits: LiveFrontEnd):
    process = psutil.Process()
    before = process.memory_info().rss
    connections = [_connect(short_limits, 4096) for _ in range(50)]
    for connection in connections:
        connection.sendall(_request(max_tokens=10**5))
    _wait_for_running(short_limits, 50)
    assert short_limits.idle(30.0)
    assert process.memory_info().rss - before < 100 * 2**20
    for connection in connections:
        data = _read_all(connection)
        assert data.startswith(b"HTTP/1.1 200") and b"[DONE]" not in data
        connection.close()


def test_a_reader_beside_those_that_do_not_read(short_limits: LiveFrontEnd):
    stalled = [_connect(short_limits, 4096) for _ in range(10)]
    for connection in stalled:
        connection.sendall(_request(max_tokens=10**5))
    _wait_for_running(short_limits, 10)
    answer = short_limits.client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 50, "temperature": 0})
    assert answer.json()["usage"]["completion_tokens"] == 50
    for connection in stalled:
        connection.close()


def test_silence_is_broken_by_comments(short_limits: LiveFrontEnd):
    short_limits.engine.step_seconds = 1.2
    try:
        with _connect(short_limits) as connection:
            connection.sendall(_request(max_tokens=2) + b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n")
            data = _read_all(connection)
    finally:
        short_limits.engine.step_seconds = 0.002
    head, _, rest = data.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head
    assert rest.count(b":\n\n") >= 2 and rest.count(b"data: {") == 2
    assert rest.index(b"data: {") < rest.rindex(b":\n\n") < rest.index(b"data: [DONE]")


def test_headers_are_bounded(short_limits: LiveFrontEnd, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "jaxserve.http.protocol")
    one = b"GET /health HTTP/1.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n"
    many = b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n"
    unending = b"GET /" + b"a" * 100_000
    for head in (one, many, unending):
        with _connect(short_limits) as connection:
            connection.sendall(head)
            assert _read_all(connection).startswith(b"HTTP/1.1 431")
    assert [record.getMessage()[-35:] for record in caplog.records] == ["431 Request Header Fields Too Large"] * 3


def test_requests_must_arrive_in_time(short_limits: LiveFrontEnd):
    for sent, answer in (
        (b"", b""),
        (b"POST /generate HTTP/1.1\r\nhost:", b"HTTP/1.1 408"),
        (b"POST /generate HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{", b""),
    ):
        with _connect(short_limits) as connection:
            connection.sendall(sent)
            begin = time.monotonic()
            data = _read_all(connection)
            assert data.startswith(answer) and bool(data) == bool(answer)
            assert time.monotonic() - begin < 5


def test_a_body_that_is_too_large_ends_the_connection(short_limits: LiveFrontEnd):
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    for more in (
        b"content-length: 900000000000\r\n\r\n{",
        b"transfer-encoding: chunked\r\n\r\n" + b"100000\r\n" + b" " * 0x100000 + b"\r\n",
    ):
        with _connect(short_limits) as connection:
            connection.sendall(head + more)
            if b"chunked" in more:
                connection.sendall(b"100000\r\n" + b" " * 0x100000)
            data = _read_all(connection)
            assert data.startswith(b"HTTP/1.1 413") and b"connection: close" in data and b"larger than 2000000 bytes" in data


def test_upgrades_are_not_taken_and_not_told(short_limits: LiveFrontEnd, caplog: pytest.LogCaptureFixture):
    with _connect(short_limits) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert not [record for record in caplog.records if "upgrade" in record.getMessage().lower()]


@pytest.mark.parametrize("cut", [0, 1, 7, 10**6])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_to_upgrade_is_answered_as_any_other(short_limits: LiveFrontEnd, cut: int, chunked: bool):
    """As Java's HttpClient sends it, body and all; and so are the requests after it on its connection."""
    body = json.dumps({"prompt": "abc", "max_tokens": 3, "temperature": 0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: Upgrade, HTTP2-Settings\r\n"
    head += b"upgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n" if chunked else b"content-length: %d\r\n\r\n" % len(body)
    told = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    probe = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    sent = head + told + probe + head + told + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with _connect(short_limits) as connection:
        connection.sendall(sent[: len(head) + cut])
        time.sleep(0.05)
        connection.sendall(sent[len(head) + cut :])
        data = _read_all(connection)
    assert data.count(b"HTTP/1.1 200") == 4 and data.count(b'"text":"abc"') == 2, data


def test_a_request_to_upgrade_has_no_more_time_and_room_than_others(short_limits: LiveFrontEnd):
    ask = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
    with _connect(short_limits) as connection:
        connection.sendall(ask + b"content-length: 10\r\n\r\n{")
        assert _read_all(connection) == b""
    with _connect(short_limits) as connection:
        connection.sendall(ask + b"transfer-encoding: chunked\r\n\r\nnonsense\r\n")
        assert _read_all(connection).startswith(b"HTTP/1.1 400")
    with _connect(short_limits) as connection:
        connection.sendall(ask + b"content-length: 3000000\r\n\r\n" + b" " * 3000000)
        assert _read_all(connection).startswith(b"HTTP/1.1 413")


def test_too_many_connections(short_limits: LiveFrontEnd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", len(short_limits.http.server_state.connections))
    with _connect(short_limits) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        data = _read_all(connection)
        assert data.startswith(b"HTTP/1.1 503") and b"retry-after" in data


def test_bytes_that_are_not_http(short_limits: LiveFrontEnd):
    with _connect(short_limits) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        assert _read_all(connection).startswith(b"HTTP/1.1 400")


def test_chunked_and_pipelined_requests(short_limits: LiveFrontEnd):
    body = json.dumps({"prompt": "abc", "max_tokens": 3, "temperature": 0}).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:5], body[5:])) + b"0\r\nx-trailer: y\r\n\r\n"
    chunked = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n" + chunks
    with _connect(short_limits) as connection:
        connection.sendall(chunked + _request(False, max_tokens=3) + b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n")
        data = _read_all(connection)
    assert data.count(b"HTTP/1.1 200") == 3 and data.count(b'"text":"abc"') == 2


def test_body_far_beyond_the_limit_is_cut_off(short_limits: LiveFrontEnd):
    sent = 0
    with _connect(short_limits) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"POST /generate HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        while sent < 10**9:
            connection.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
            sent += 0x8000


def test_many_streams_at_once(short_limits: LiveFrontEnd):
    async def one(number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", short_limits.port)
        writer.write(_request(prompt=f"stream {number}", max_tokens=30, temperature=0))
        data = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        return data.count(b"data: {")

    async def run() -> list[int]:
        return await asyncio.gather(*(one(number) for number in range(64)))

    assert asyncio.run(run()) == [30] * 64
