"""The wire between http and engine processes: conversions, and a real server and client on a unix socket."""

import ast
import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path

import grpc
import numpy as np
import pytest
from engine_double import EngineDouble
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxserve.rpc
from jaxserve.errors import ContextTooLong, EngineUnavailable, GenerationFailed, InvalidRequest, Overloaded
from jaxserve.grammar import Grammar
from jaxserve.request import EngineInfo, EngineStats, FinishReason, PromptLogprobs, Request, SamplingParams, TokenLogprobs, TokenOutput
from jaxserve.rpc import client as client_module
from jaxserve.rpc import engine_pb2 as pb
from jaxserve.rpc import server as server_module
from jaxserve.rpc import wire
from jaxserve.rpc.client import EngineClient
from jaxserve.rpc.handshake import StreamKey
from jaxserve.rpc.router import Router
from jaxserve.rpc.server import EngineServer


def test_request_round_trip():
    params = SamplingParams(
        n=3, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, typical_p=0.5, repetition_penalty=1.1, presence_penalty=-1.0,
        frequency_penalty=2.0, seed=2**64 - 1, max_tokens=None, min_tokens=2, stop_token_ids=(3, 4), ignore_eos=True, logprobs=0,
        prompt_logprobs=5, logit_bias={7: -100.0, 9: 0.5}, grammar=Grammar.choice(["é", "b"], "guided_choice"),
    )  # fmt: skip
    request = Request("r-1", (1, 500, 70000), params, "salt", "adapter")
    read = wire.request_from(wire.generate_message(1, request).generate)
    assert read == request
    assert read.params.grammar is not None and read.params.grammar.param == "guided_choice"


def test_negative_seed_keeps_its_64_bits():
    message = wire.generate_message(1, Request("r", (1,), SamplingParams(seed=-1)))
    assert wire.request_from(message.generate).params.seed == 2**64 - 1


def test_absent_options_stay_absent():
    params = wire.request_from(wire.generate_message(1, Request("r", (1,), SamplingParams())).generate).params
    assert (params.seed, params.logprobs, params.max_tokens) == (None, None, 16)


def _logprobs(top: int) -> st.SearchStrategy[TokenLogprobs]:
    number = st.floats(-50, 0, width=32) | st.just(-math.inf)
    tops = st.lists(number, min_size=top, max_size=top)
    return st.builds(TokenLogprobs, number, number, st.lists(st.integers(0, 99999), min_size=top, max_size=top), tops, tops)


@st.composite
def _outputs(draw: st.DrawFn) -> TokenOutput:
    token_ids = draw(st.lists(st.integers(0, 200000), max_size=3))
    top = draw(st.integers(0, 3))
    logprobs = [draw(_logprobs(top)) for _ in token_ids] if draw(st.booleans()) else []
    reason = draw(st.sampled_from([None, *FinishReason]))
    return TokenOutput("", draw(st.integers(0, 127)), token_ids, logprobs, reason, error="x" if reason is FinishReason.ERROR else "")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2**40), _outputs()), max_size=8))
def test_output_columns_round_trip(outputs: list[tuple[int, TokenOutput]]):
    columns = wire.OutputColumns()
    for number, output in outputs:
        columns.add(number, output, first=False)
    message = columns.message()
    read = list(wire.outputs_from(type(message).FromString(message.SerializeToString())))
    assert read == [(number * 128 + output.index, output) for number, output in outputs]


def test_prompt_logprobs_round_trip():
    random = np.random.default_rng(0)
    raw, top_raw = random.random(7, np.float32), random.random((7, 3), np.float32)
    sent = PromptLogprobs(raw, np.arange(7, dtype=np.int32), np.arange(21, dtype=np.int32).reshape(7, 3), top_raw)
    columns = wire.OutputColumns()
    columns.add(1, TokenOutput("", 0, [5], []), first=True)
    columns.add(2, TokenOutput("", 0, [5], [], prompt_logprobs=sent), first=True)
    (_, other), (_, output) = wire.outputs_from(columns.message())
    assert other.prompt_logprobs is None and output.prompt_logprobs is not None
    for field in fields(sent):
        np.testing.assert_array_equal(getattr(output.prompt_logprobs, field.name), getattr(sent, field.name))


def test_first_output_tells_of_the_cache_and_the_queue():
    columns = wire.OutputColumns()
    columns.add(1, TokenOutput("", 0, [5], [], None, 12, 0.5), first=True)
    ((_, output),) = wire.outputs_from(columns.message())
    assert (output.num_cached_tokens, output.queue_time, output.finish_reason) == (12, 0.5, None)


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full", 3),
        EngineUnavailable("gone", 7),
        ContextTooLong("long", "prompt"),
        InvalidRequest("bad", None),
    ],
)
def test_rejections_keep_their_class(error: Exception):
    read = wire.error_from(wire.rejection_message(1, error))  # type: ignore[arg-type]
    assert (type(read), str(read), vars(read)) == (type(error), str(error), vars(error))


def test_info_and_stats_round_trip():
    info = EngineInfo(
        "m",
        "main",
        "/x",
        10,
        20,
        19,
        (1, 2),
        16,
        5,
        "1x2",
        "float32",
        "cpu",
        {"temperature": 0.6, "top_k": 20},
        deterministic=True,
        kv_cache_dtype="fp8_e5m2",
        windows=(0, 4096),
        quantization="gguf (Q4_1, Q8_0)",
        weight_bytes=2**33,
    )
    read = wire.info_from(wire.info_message(info))
    assert read == info
    SamplingParams(**read.defaults).validate(info.vocab_size)  # type: ignore[arg-type]
    stats = EngineStats(num_running=3, prompt_tokens=2**40, schedule_seconds=0.25, device_counts=(0, 2**40, 1))
    assert wire.stats_from(wire.stats_message(stats)) == stats


def test_no_pickle_on_the_wire():
    for path in Path(jaxserve.rpc.__path__[0]).glob("*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        }
        assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "multiprocessing"}


@asynccontextmanager
async def _served(folder: Path, engine: EngineDouble) -> AsyncIterator[EngineClient]:
    server = EngineServer(engine, folder / "engine.sock")
    await server.start()
    client = EngineClient(folder / "engine.sock")
    client.start()
    try:
        async with asyncio.timeout(20):
            while not client.available:
                await asyncio.sleep(0.01)
            yield client
    finally:
        await client.close()
        await server.stop(0)
        engine.close()


def _request(name: str, length: int = 5, **params: object) -> Request:
    return Request(name, tuple(range(10, 10 + length)), SamplingParams(**{"temperature": 0.0, **params}))


async def _tokens(client: EngineClient, request: Request) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {index: [] for index in range(request.params.n)}
    async for output in client.generate(request):
        assert output.request_id == request.request_id
        tokens[output.index] += output.token_ids
    return tokens


def test_many_requests_at_once(tmp_path: Path):
    async def run() -> None:
        async with _served(tmp_path, EngineDouble("")) as client:
            assert client.info is not None and client.info.vocab_size == 512
            assert (tmp_path / "engine.sock").stat().st_mode & 0o777 == 0o600
            requests = [_request(f"r{n}", length=n + 1, max_tokens=None) for n in range(64)]
            answers = await asyncio.gather(*(_tokens(client, request) for request in requests))
            assert [answer[0][:-1] for answer in answers] == [list(request.prompt_token_ids) for request in requests]
            assert client.num_in_flight == 0

    asyncio.run(run())


def test_samples_of_one_request_and_abort_of_one(tmp_path: Path):
    async def run() -> None:
        engine = EngineDouble("", step_seconds=0.005)
        async with _served(tmp_path, engine) as client:
            generation = client.submit(_request("r", n=2, temperature=1.0, max_tokens=None, ignore_eos=True))
            assert {output.index for output in await generation.read()} <= {0, 1}
            generation.abort(0)
            for _ in range(5):
                await generation.read()  # may hold what came before the abort
            assert {output.index for output in await generation.read()} == {1}
            generation.abort()
            assert await generation.read() == [] or await generation.read() == []
            assert await asyncio.to_thread(engine.drain, 2.0)

    asyncio.run(run())


def test_rejections(tmp_path: Path):
    async def run() -> None:
        async with _served(tmp_path, EngineDouble("", max_concurrent_requests=1, step_seconds=0.01, forever=True)) as client:
            first = client.submit(_request("a", max_tokens=None))
            await first.read()
            with pytest.raises(Overloaded):
                await client.submit(_request("b")).read()
            first.abort()
            with pytest.raises(InvalidRequest):
                await client.submit(Request("c", (100000,), SamplingParams())).read()
            assert len(await _tokens(client, _request("d", max_tokens=3))) == 1

    asyncio.run(run())


def test_a_failed_step_is_an_error_of_that_request(tmp_path: Path):
    async def run() -> None:
        async with _served(tmp_path, EngineDouble("", fail_token_id=99)) as client:
            with pytest.raises(GenerationFailed, match="the step failed"):
                await _tokens(client, Request("f", (99, 98, 97, 96), SamplingParams(n=2)))
            assert client.num_in_flight == 0
            assert await _tokens(client, _request("g", length=2)) == {0: [10, 11, 0]}

    asyncio.run(run())


def test_a_refused_grammar_is_the_clients_fault(tmp_path: Path):
    async def run() -> None:
        async with _served(tmp_path, EngineDouble("")) as client:
            params = SamplingParams(n=3, grammar=Grammar.regex("refused", "guided_regex"))
            with pytest.raises(InvalidRequest, match="the grammar is refused") as caught:
                await client.submit(Request("r", (9, 8), params)).read()
            assert caught.value.param == "guided_regex" and client.num_in_flight == 0
            assert await _tokens(client, _request("g", length=2)) == {0: [10, 11, 0]}

    asyncio.run(run())


class FailingDouble(EngineDouble):
    """Ends as AsyncEngine does when a step raised."""

    def fail(self) -> None:
        with self._lock:
            self.failure = "the device is gone"
            ended, self._samples = self._samples, []
        for each in ended:
            each.sink.put([TokenOutput(each.request.request_id, each.index, [], [], FinishReason.ERROR, error=self.failure)])


def test_a_failed_engine_has_not_begun_what_waits(tmp_path: Path):
    async def run() -> None:
        engine = FailingDouble("", forever=True, step_seconds=0.01, max_batch_size=1)
        async with _served(tmp_path, engine) as client:
            running, waiting = client.submit(_request("r", max_tokens=None)), client.submit(_request("w", n=2))
            await running.read()
            await _until(lambda: engine.stats().num_waiting == 2)
            engine.fail()
            with pytest.raises(GenerationFailed, match="the device is gone"):
                while await running.read():
                    pass
            with pytest.raises(EngineUnavailable, match="the device is gone"):  # so a router may send it elsewhere
                await waiting.read()
            assert client.num_in_flight == 0

    asyncio.run(run())


def test_a_client_that_hangs_up_is_no_error_of_the_engine(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    async def run() -> None:
        for number in range(4):
            async with _served(tmp_path, EngineDouble("", forever=True, step_seconds=0.0005)) as client:
                generations = [client.submit(_request(f"{number}-{n}", max_tokens=None)) for n in range(50)]
                await generations[0].read()
                await client.close()

    asyncio.run(run())
    assert "Error" not in capfd.readouterr().err


def test_nothing_of_a_stopped_server_is_left(tmp_path: Path):
    """What gRPC still had to do when the event loop ended, it told as an error with a traceback."""

    async def run() -> None:
        engine = EngineDouble("")
        server, client = EngineServer(engine, tmp_path / "engine.sock"), EngineClient(tmp_path / "engine.sock")
        await server.start()
        before = asyncio.all_tasks()
        client.start()
        await _until(lambda: client.available)
        await server.stop(10)
        names = [task.get_coro().__qualname__ for task in asyncio.all_tasks() - before]  # type: ignore[union-attr]
        assert "_schedule_rpc_coro" not in names and "_handle_exceptions" not in names
        await client.close()
        engine.close()

    for _ in range(3):
        asyncio.run(run())


def test_engine_gone_and_back(tmp_path: Path):
    async def run() -> None:
        engine = EngineDouble("", step_seconds=0.01, forever=True)
        server = EngineServer(engine, tmp_path / "engine.sock")
        client = EngineClient(tmp_path / "engine.sock")
        router = Router([client])
        router.start()
        with pytest.raises(EngineUnavailable):
            router.submit(_request("early"))
        await server.start()
        await _until(lambda: router.available)
        generation = router.submit(_request("r", max_tokens=None))
        await generation.read()
        await server.stop(0)
        with pytest.raises(EngineUnavailable, match="ended while"):
            while await generation.read():
                pass
        with pytest.raises(EngineUnavailable):
            router.submit(_request("later"))
        assert await asyncio.to_thread(engine.drain, 2.0)  # the broken stream's requests were aborted
        again = EngineServer(engine, tmp_path / "engine.sock")
        await again.start()
        await _until(lambda: router.available)
        assert (await _tokens(client, _request("s", max_tokens=3)))[0] == [10, 11, 12]
        await router.close()
        await again.stop(0)
        engine.close()

    asyncio.run(run())


def test_an_engine_on_another_host(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Only who knows the secret reaches it, and only the engine that is meant; it tells before it leaves."""

    async def run() -> None:
        engine, key = EngineDouble("/its/own/path", step_seconds=0.01), StreamKey("sixteen characters", 1)
        server = EngineServer(engine, "127.0.0.1", key)
        await server.start()
        place = tmp_path / "engine-1.address"
        client = EngineClient(place, 1, key)
        strangers = [EngineClient(place, 1, StreamKey("another secret of mine", 1)), EngineClient(place, 2, StreamKey(key.secret, 2))]
        for each in (client, *strangers):
            each.start()
        place.write_text(server.address)
        await _until(lambda: client.available)
        assert (await _tokens(client, _request("r", max_tokens=3)))[0] == [10, 11, 12]
        assert client.info is not None and client.info.model_path == ""

        # One that does not prove anything itself is told nothing, whatever it asks for.
        async with grpc.aio.insecure_channel(server.address) as channel:
            for first in (wire.generate_message(1, _request("s")), pb.ClientMessage(hello=pb.Hello(challenge=b"c" * 32))):
                call = channel.stream_stream(client_module.METHOD, pb.ClientMessage.SerializeToString, pb.EngineMessage.FromString)()
                await call.write(first)
                answer = await call.read()
                assert isinstance(answer, pb.EngineMessage) and answer.HasField("answer") and not answer.HasField("info")
                await call.write(wire.generate_message(1, _request("s")))
                assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
            call = channel.stream_stream(client_module.METHOD)()
            await call.write(b"\xff" * 99)  # which is no message
            assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
        assert not any(stranger.available for stranger in strangers) and engine.counters["prompt_tokens"] == 5

        router = Router([client])
        running = router.submit(_request("t", max_tokens=20, ignore_eos=True))
        await running.read()
        server.leave()
        await _until(lambda: client.leaving)
        with pytest.raises(EngineUnavailable):
            router.submit(_request("u"))
        while not running.finished:
            await running.read()
        place.unlink()
        await server.stop(1.0)
        await _until(lambda: not client.available)
        assert client.num_losses == 0
        for each in (client, *strangers):
            await each.close()
        engine.close()

    asyncio.run(run())
    assert "has another cluster secret, or is another engine" in caplog.text


async def _until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def test_router_takes_the_least_loaded(tmp_path: Path):
    async def run() -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        slow = {"step_seconds": 0.01, "forever": True}
        async with _served(tmp_path / "a", EngineDouble("", **slow)) as a, _served(tmp_path / "b", EngineDouble("", **slow)) as b:
            router = Router([a, b])
            generations = [router.submit(_request(f"r{n}", max_tokens=None)) for n in range(6)]
            assert (a.num_in_flight, b.num_in_flight) == (3, 3)
            for generation in generations:
                generation.abort()

    asyncio.run(run())


def test_reader_of_one_request_that_never_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_module, "MAX_UNREAD_OUTPUTS", 20)

    async def run() -> None:
        engine = EngineDouble("", forever=True, step_seconds=0.001)
        async with _served(tmp_path, engine) as client:
            unread = client.submit(_request("unread", max_tokens=None))
            await _until(lambda: client.num_in_flight == 0)
            assert await asyncio.to_thread(engine.drain, 2.0)
            with pytest.raises(GenerationFailed):
                while await unread.read():
                    pass

    asyncio.run(run())


# An http process that submits a request and is then stopped (SIGSTOP) by the test.
STALLED_CLIENT = """
import asyncio, sys
from pathlib import Path
from jaxserve.request import Request, SamplingParams
from jaxserve.rpc.client import EngineClient
async def main():
    client = EngineClient(Path(sys.argv[1])); client.start()
    while not client.available: await asyncio.sleep(0.01)
    generations = [client.submit(Request(f"stalled{n}", (5, 6, 7), SamplingParams(max_tokens=None))) for n in range(64)]
    await generations[0].read()
    print("reading", flush=True)
    while True:
        for generation in generations: await generation.read()
asyncio.run(main())
"""


def test_a_stalled_http_process_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "MAX_PENDING_OUTPUTS", 5000)

    async def run() -> None:
        engine = EngineDouble("", forever=True, step_seconds=0.0005, max_total_tokens=10**6)
        async with _served(tmp_path, engine) as client:
            stalled = subprocess.Popen(
                [sys.executable, "-c", STALLED_CLIENT, str(tmp_path / "engine.sock")], stdout=subprocess.PIPE, text=True
            )
            try:
                assert stalled.stdout is not None
                assert await asyncio.to_thread(stalled.stdout.readline) == "reading\n"
                os.kill(stalled.pid, signal.SIGSTOP)
                begin = time.monotonic()
                assert await _tokens(client, _request("other", max_tokens=3)) == {0: [10, 11, 12]}
                assert time.monotonic() - begin < 2.0
                assert await asyncio.to_thread(engine.drain, 10.0)  # the stalled one's requests were aborted
            finally:
                stalled.kill()
                stalled.communicate()

    asyncio.run(run())


def test_killed_http_process_leaves_no_request(tmp_path: Path):
    async def run() -> None:
        engine = EngineDouble("", forever=True, step_seconds=0.005)
        async with _served(tmp_path, engine):
            killed = subprocess.Popen(
                [sys.executable, "-c", STALLED_CLIENT, str(tmp_path / "engine.sock")], stdout=subprocess.PIPE, text=True
            )
            assert killed.stdout is not None
            assert await asyncio.to_thread(killed.stdout.readline) == "reading\n"
            await _until(lambda: engine.stats().num_running == 64)
            killed.kill()
            killed.wait()
            killed.stdout.close()
            assert await asyncio.to_thread(engine.drain, 5.0)

    asyncio.run(run())


def test_random_bytes_on_the_socket_harm_nobody(tmp_path: Path):
    async def run() -> None:
        async with _served(tmp_path, EngineDouble("")) as client:
            for junk in (b"\x80\x04\x95\x10\x00\x00\x00", os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n"):
                _, writer = await asyncio.open_unix_connection(str(tmp_path / "engine.sock"))
                writer.write(junk)
                await writer.drain()
                writer.close()
            assert (await _tokens(client, _request("r", max_tokens=2)))[0] == [10, 11]

    asyncio.run(run())
