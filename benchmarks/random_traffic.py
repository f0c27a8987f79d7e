"""Minutes of random traffic against a server of its own: no error, no leak, no compilation after ready.

    python -m benchmarks.random_traffic FOLDER [--seconds 360] [--clients 300] [--server-flags="..."]

FOLDER holds a config.json and a tokenizer; the weights are random. Clients send, one request after the other, prompts and outputs of any
legal length with any sampling options over OpenAI's and TGI's routes, streamed or whole; a fifth hang up in the middle. Beside them
come illegal requests, each of which must get its 4xx, and bursts of more requests than the server takes, of which some must get 429.

Checked of every answer: status, the end of the stream, the number of tokens. Checked after the last: nothing runs or waits, no page
is held, all permits are free (as many requests at once as the server takes, all answered), nothing was compiled, and the first
requests after ready were not twice as slow as their like later.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.server import Server

WORDS = ["river", "stone", "light", "paper", "engine", "garden", "window", "number", "winter", "music"]
ABORTED_SHARE, ILLEGAL_SHARE, SHARED_PREFIX_SHARE = 0.2, 0.05, 0.3
LONGEST_SHARE = 0.003  # prompts as long as is legal
BURST_INTERVAL, BURST_EXCESS = 30.0, 200  # seconds; requests more than the server takes
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "tgi_queue_size", "tgi_batch_current_size")
LEAVING = 10.0  # seconds in which the server may not have noticed yet that a client has left
LATE, LATE_SECONDS = 2.0, 0.1  # the first time to a first token, against a later one


@dataclass
class Tally:
    """What came back.

    Attributes:
        outcomes: number of requests by kind and status.
        faults: what should not have been, in words.
    """

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    output_tokens: int = 0


class Traffic:
    """All clients of a server.

    Args:
        limits: the server's /info.
        usual: most tokens of all prompts but a few.
        vocab_size: token ids are below it.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, limits: dict[str, Any], vocab_size: int, usual: int, seed: int = 0):
        self.tally = Tally()
        self._session = session
        self._url = url
        self._limits = limits
        self._usual = usual
        self._ids = range(3, min(49000, vocab_size))
        self._random = random.Random(seed)
        self._prefix = self._random.choices(self._ids, k=min(2000, self._longest // 2))
        self._num_open = 0
        self._left: collections.deque[float] = collections.deque()  # when clients left

    @property
    def _longest(self) -> int:
        return self._limits["max_total_tokens"]

    async def run(self, seconds: float, clients: int) -> None:
        """Send until the time is over, and wait for what was sent."""
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(self._client(end))
            tasks.create_task(self._bursts(end))

    async def all_permits(self) -> None:
        """As many requests at once as the server takes: all are answered."""
        count = self._limits["max_concurrent_requests"]
        await asyncio.gather(
            *(self._send("permits", "/v1/completions", self._body([5], 4), tokens=4, may_refuse=False) for _ in range(count))
        )

    async def time_to_first_token(self, length: int) -> float:
        """Seconds, of a new prompt with nothing beside it."""
        begin = time.perf_counter()
        body = self._body(self._random.choices(self._ids, k=length), 2) | {"stream": True}
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            await response.content.readany()
            first = time.perf_counter() - begin
            await response.read()
        return first

    async def _client(self, end: float) -> None:
        await asyncio.sleep(self._random.random())
        while time.monotonic() < end:
            if self._random.random() < ILLEGAL_SHARE:
                await self._send_illegal()
            else:
                await self._send_legal()
            await asyncio.sleep(self._random.expovariate(4.0))

    async def _bursts(self, end: float) -> None:
        while time.monotonic() < end:
            count = self._limits["max_concurrent_requests"] + BURST_EXCESS
            await asyncio.gather(*(self._send("burst", "/v1/completions", self._body([7, 8, 9], 16), tokens=16) for _ in range(count)))
            await asyncio.sleep(min(BURST_INTERVAL, max(end - time.monotonic(), 0)))
        # Of one burst the first may be answered before the client has sent the last.
        if not self.tally.outcomes["burst 429"]:
            self.tally.faults.append("more requests at once than the server takes, and none was refused")

    def _body(self, prompt: Any, max_tokens: int) -> dict[str, Any]:
        return {"model": "tgi", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}

    def _length(self, most: int) -> int:
        """Each order of magnitude as likely as the others."""
        return max(1, min(most, round(most ** self._random.random())))

    async def _send_legal(self) -> None:
        rng = self._random
        num_out = self._length(min(512, self._longest // 4))
        most = self._longest - num_out - 1
        num_in = most if rng.random() < LONGEST_SHARE else self._length(min(most, self._usual))
        prompt = rng.choices(self._ids, k=num_in)
        if rng.random() < SHARED_PREFIX_SHARE:
            prompt = (self._prefix[: rng.randrange(len(self._prefix))] + prompt)[:num_in]
        options = self._options()
        runs_on = options.get("ignore_eos") and not {"stop", "stop_token_ids"} & options.keys()
        exact = num_out * options.get("n", 1) if runs_on else None
        kind, streamed = rng.choice(("completion", "completion", "chat", "generate")), rng.random() < 0.7
        text = " ".join(rng.choices(WORDS, k=max(1, min(num_in // 4, 400, self._longest // 16))))
        hang_up = rng.randrange(1, 40) if rng.random() < ABORTED_SHARE else None
        if kind == "generate":
            named = {"top_k": options["top_k"]} if options.get("top_k", 0) > 0 else {}
            body: dict[str, Any] = {"inputs": text, "parameters": {"max_new_tokens": num_out, "do_sample": True, "details": True, **named}}
            await self._send(kind, "/generate_stream" if streamed else "/generate", body, hang_up=hang_up, done=False)
            return
        if kind == "chat":
            options.pop("logprobs", None)
            body = {"model": "tgi", "messages": [{"role": "user", "content": text}], "max_completion_tokens": num_out}
        else:
            body = {"model": "tgi", "prompt": prompt, "max_tokens": num_out}
        body |= options | ({"stream": True, "stream_options": {"include_usage": True}} if streamed else {})
        path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
        await self._send(kind, path, body, tokens=exact, hang_up=hang_up, done=streamed)

    def _options(self) -> dict[str, Any]:
        rng = self._random
        every: dict[str, Callable[[], Any]] = {
            "temperature": lambda: rng.choice((0, 0.3, 0.8, 1.5)),
            "top_p": lambda: rng.choice((0.1, 0.95, 1.0)),
            "top_k": lambda: rng.choice((-1, 1, 40)),
            "min_p": lambda: rng.choice((0.0, 0.1)),
            "typical_p": lambda: rng.choice((0.5, 1.0)),
            "repetition_penalty": lambda: rng.choice((0.8, 1.2)),
            "presence_penalty": lambda: rng.choice((-1.0, 1.0)),
            "frequency_penalty": lambda: rng.choice((-1.0, 1.0)),
            "seed": lambda: rng.randrange(-5, 2**40),
            "logprobs": lambda: rng.randrange(0, 6),
            "logit_bias": lambda: {str(token): rng.uniform(-5, 5) for token in rng.choices(self._ids, k=rng.randrange(1, 200))},
            "stop": lambda: rng.choice(("e", ["river", "zz"], ["the"])),
            "stop_token_ids": lambda: rng.choices(self._ids, k=rng.randrange(1, 30)),
            "ignore_eos": lambda: True,
            "n": lambda: rng.choice((1, 2, 4)),
        }
        chosen = [name for name in every if rng.random() < 0.25]
        return {name: every[name]() for name in chosen}

    async def _send_illegal(self) -> None:
        body = self._body([5, 6], 4)
        wrong: list[dict[str, Any]] = [
            body | {"prompt": [5] * (self._longest + 1)},
            body | {"max_tokens": self._longest},
            body | {"prompt": []},
            body | {"prompt": ["x"] * 1000},
            body | {"prompt": [self._ids.stop + 10**6]},
            body | {"temperature": -1},
            body | {"top_p": 0},
            body | {"n": 10**6},
            body | {"stop": [str(i) for i in range(100)]},
            body | {"logprobs": 1000},
            body | {"prompt": "x" * 2_500_000},
            {"prompt": 7},
        ]
        await self._send("illegal", "/v1/completions", self._random.choice(wrong), illegal=True)

    async def _send(
        self,
        kind: str,
        path: str,
        body: dict[str, Any],
        tokens: int | None = None,
        hang_up: int | None = None,
        done: bool = False,
        illegal: bool = False,
        may_refuse: bool = True,
    ) -> None:
        """Send a request and judge its answer.

        Args:
            tokens: output tokens that it must have, where they are known.
            hang_up: chunks after which the client leaves.
            done: the answer is a stream that must end with [DONE].
            illegal: it must be refused.
            may_refuse: 429 is legal where the server may have as many requests already as it takes.
        """
        while self._left and self._left[0] < time.monotonic() - LEAVING:
            self._left.popleft()
        crowded = self._num_open + len(self._left) >= self._limits["max_concurrent_requests"]
        self._num_open += 1
        try:
            async with self._session.post(self._url + path, json=body) as response:
                status, chunks, data = response.status, 0, b""
                if hang_up is not None and status == 200:
                    async for chunk in response.content.iter_any():
                        chunks += 1
                        if chunks >= hang_up:
                            self.tally.outcomes[f"{kind} left"] += 1
                            self._left.append(time.monotonic())
                            return
                        data += chunk
                else:
                    data = await response.read()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            self._fault(kind, body, f"{type(error).__name__}: {error}")
            return
        finally:
            self._num_open -= 1
        self.tally.outcomes[f"{kind} {status}"] += 1
        if status == 429 and may_refuse and crowded:
            return
        if illegal:
            if not 400 <= status < 500 or status == 429:
                self._fault(kind, body, f"{status}: {data[:200]!r}")
        elif status != 200:
            self._fault(kind, body, f"{status}: {data[:200]!r}")
        else:
            self._judge(kind, body, data, tokens, done)

    def _judge(self, kind: str, body: dict[str, Any], data: bytes, tokens: int | None, done: bool) -> None:
        if has_error(data):
            self._fault(kind, body, f"an error in the answer: {data[-300:]!r}")
        elif done and not data.rstrip().endswith(b"data: [DONE]"):
            self._fault(kind, body, f"the stream did not end: {data[-200:]!r}")
        elif kind != "generate":
            found = [int(number) for number in re.findall(rb'"completion_tokens": ?(\d+)', data)]
            if not found:
                self._fault(kind, body, f"no usage: {data[-200:]!r}")
                return
            self.tally.output_tokens += found[-1]
            if tokens is not None and found[-1] != tokens:
                self._fault(kind, body, f"{found[-1]} output tokens, not {tokens}")

    def _fault(self, kind: str, body: dict[str, Any], what: str) -> None:
        long = ("prompt", "messages", "inputs", "logit_bias", "stop_token_ids")
        shown = {name: value for name, value in body.items() if name not in long}
        self.tally.faults.append(f"{kind} {json.dumps(shown)[:200]}: {what}")


def has_error(answer: bytes) -> bool:
    """Whether an answer with status 200, JSON or a stream of events, holds an error object. A token may be spelled "error", too."""
    found = [line[5:] for line in answer.splitlines() if line.startswith(b"data:") and line[5:].strip() != b"[DONE]"]
    return any({"error", "error_type"} & event.keys() for event in map(json.loads, found or [answer]) if isinstance(event, dict))


async def check(server: Server, seconds: float, clients: int, vocab_size: int, usual: int) -> list[str]:
    """Run the traffic against a server that is ready.

    Returns:
        all faults; empty where there are none.
    """
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        async with session.get(f"{server.url}/info") as response:
            limits = await response.json()
        traffic = Traffic(session, server.url, limits, vocab_size, usual)
        lengths = [length for length in (1, 30, 300, 3000, 12000) if length < limits["max_input_tokens"] - 2]
        first = {length: await traffic.time_to_first_token(length) for length in lengths}
        await traffic.run(seconds, clients)
        idle = await _idle(server)
        faults = traffic.tally.faults
        later = {length: await traffic.time_to_first_token(length) for length in lengths}
        faults += [
            f"the first prompt of {length} tokens took {first[length]:.3f} s to its first token, a later one {later[length]:.3f}"
            for length in lengths
            if first[length] > LATE * later[length] and first[length] - later[length] > LATE_SECONDS
        ]
        await traffic.all_permits()
        idle = idle or await _idle(server)
    faults += idle
    counts = ", ".join(f"{name}: {count}" for name, count in sorted(traffic.tally.outcomes.items()))
    print(f"answers: {counts}\noutput tokens: {traffic.tally.output_tokens}")
    metrics = await asyncio.to_thread(server.metrics)
    names = ("jaxserve_steps_total", "vllm:num_preemptions_total", "jaxserve_compile_events_total", "vllm:prefix_cache_hits_total")
    print(", ".join(f"{name} {metrics[name]:.0f}" for name in names))
    if metrics["jaxserve_compile_events_total"]:
        faults.append("something was compiled after ready")
    return faults


async def _idle(server: Server, timeout: float = 30.0) -> list[str]:
    """What is not back at zero though nothing was asked for any more."""
    end = time.monotonic() + timeout
    while True:
        metrics = await asyncio.to_thread(server.metrics)
        left = [f"{name} is {metrics[name]} after the last request" for name in GAUGES if metrics[name]]
        if metrics["jaxserve_engine_up"] != 1:
            left.append("the engine is down")
        if not left or time.monotonic() > end:
            return left


def main() -> None:
    """Read the arguments, start the server and check."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--usual", type=int, default=16384, help="tokens of the longest prompts, but for a few as long as is legal")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "random_traffic.log", help="what the server said")
    parser.add_argument("--server-flags", type=shlex.split, default=[], help="further flags of the server, one text")
    arguments = parser.parse_args()
    vocab_size = json.loads((Path(arguments.folder) / "config.json").read_text())["vocab_size"]
    flags = ["--model-id", arguments.folder, "--load-format", "dummy", "--max-best-of", "4", *arguments.server_flags]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(flags, arguments.log))
        print(f"ready after {server.ready_seconds:.1f} s; traffic for {arguments.seconds:.0f} s", flush=True)
        faults = asyncio.run(check(server, arguments.seconds, arguments.clients, vocab_size, arguments.usual))
        if code := server.end():
            faults.append(f"the server ended with {code}")
    suspicious = [line for line in arguments.log.read_text().splitlines() if "Traceback" in line or " error" in line.lower()]
    faults += [f"in the log: {line[:200]}" for line in suspicious[:5]]
    print(*faults[:20], sep="\n")
    print(f"{len(faults)} faults" if faults else "no fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
