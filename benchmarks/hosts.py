"""One machine's GPUs as one host and as several: the same tokens, what a step costs, and how soon a killed host is known.

    python -m benchmarks.hosts FOLDER [--gpus 2] [--hosts 2] [--log FILE] [-- FLAGS]

FOLDER holds a config.json and a tokenizer; the weights are random. First `jaxserve --mesh 1xGPUS` runs in one process, then the same mesh
as hosts of as many GPUs each, over loopback. Both get the same prompts, greedy. A decode step is (time of [1024 in, 257 out] - time
of [1024 in, 1 out]) / 256 over HTTP. At the end the last host's process is killed in the middle of an answer. On the CPU
(JAX_PLATFORMS=cpu) fake devices take the place of GPUs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from typing import IO, Any

import httpx
import psutil

PORT, COORDINATOR = 3123, 29400
READY_TIME = 400.0  # seconds


class Server:
    """`jaxserve` on some hosts of this machine."""

    def __init__(self, folder: str, num_gpus: int, num_hosts: int, flags: list[str], log: IO[str]):
        self.processes: list[subprocess.Popen[bytes]] = []
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120)
        each = num_gpus // num_hosts
        for index in range(num_hosts):
            command = [sys.executable, "-m", "jaxserve", "--model-id", folder, "--load-format", "dummy", "--mesh", f"1x{num_gpus}"]
            command += ["--hostname", "127.0.0.1", "--port", str(PORT), "--no-prefix-caching", *flags]
            gpus = ",".join(str(gpu) for gpu in range(index * each, (index + 1) * each))
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
            if os.environ.get("JAX_PLATFORMS") == "cpu":
                environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={each}"
            if num_hosts > 1:
                command += ["--coordinator", f"127.0.0.1:{COORDINATOR}", "--num-hosts", str(num_hosts), "--host-index", str(index)]
                # Hosts have a cache each, as they would have on machines of their own.
                command += ["--compilation-cache-dir", os.path.expanduser(f"~/.cache/jaxserve/host-{index}")]
            self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def seconds_until_ready(self) -> float:
        """Wait until it serves."""
        begin = time.monotonic()
        while time.monotonic() < begin + READY_TIME:
            if any(process.poll() is not None for process in self.processes):
                sys.exit("the server ended; see its log")
            try:
                if self._client.get("/health").status_code == 200:
                    return time.monotonic() - begin
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        sys.exit("the server does not get ready; see its log")

    def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        """One greedy answer."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **options}
        answer = self._client.post("/v1/completions", json=body)
        answer.raise_for_status()
        return answer.json()["choices"][0]

    def decode_step(self, prompt: list[int]) -> tuple[float, float]:
        """Milliseconds of a step, the best of three, and of the host's dispatching a step."""

        def seconds(max_tokens: int) -> float:
            begin = time.perf_counter()
            self.complete(prompt, max_tokens)
            return time.perf_counter() - begin

        self.complete(prompt, 8)
        before = self._dispatched()
        step = min((seconds(257) - seconds(1)) / 256 for _ in range(3)) * 1000
        count, total = (after - before for after, before in zip(self._dispatched(), before, strict=True))
        return step, total / count * 1000

    def _dispatched(self) -> tuple[float, float]:
        """Steps, and seconds of their dispatching."""
        parts = dict.fromkeys(("count", "sum"), 0.0)
        for line in self._client.get("/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if 'part="dispatch"' in name and (part := name.partition("{")[0].rpartition("_")[2]) in parts:
                parts[part] += float(value)
        return parts["count"], parts["sum"]

    def lose_last_host(self, prompt: list[int]) -> tuple[float, str]:
        """Kill the last host's process in the middle of an answer; seconds until all launchers have ended, and how the answer ended."""
        body = {"prompt": prompt, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with self._client.stream("POST", "/v1/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            for child in psutil.Process(self.processes[-1].pid).children():
                child.kill()
            begin = time.monotonic()
            ends = [line for line in lines if "error" in line] or ["without an error"]
        codes = [process.wait(60) for process in self.processes]
        return time.monotonic() - begin, f"{ends[-1]}; exit codes {codes}"

    def end(self) -> None:
        """End all hosts."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--log", default="/tmp/hosts.log")
    own = sys.argv[1:]
    flags = own[own.index("--") + 1 :] if "--" in own else []  # of jaxserve
    arguments = parser.parse_args(own[: len(own) - len(flags) - ("--" in own)])
    generator = random.Random(0)
    prompts = [[generator.randrange(3, 300) for _ in range(length)] for length in (5, 100, 300)]
    long = [generator.randrange(3, 300) for _ in range(64 if os.environ.get("JAX_PLATFORMS") == "cpu" else 1024)]
    answers: list[list[str]] = []
    with open(arguments.log, "w") as log:
        for num_hosts in (1, arguments.hosts):
            server = Server(arguments.folder, arguments.gpus, num_hosts, flags, log)
            print(f"{num_hosts} host(s): ready after {server.seconds_until_ready():.1f} s", flush=True)
            answers.append([server.complete(prompt, 64)["text"] for prompt in prompts])
            step, dispatch = server.decode_step(long)
            print(f"{num_hosts} host(s): decode step B=1 {step:.2f} ms; the host's dispatch {dispatch:.3f} ms a step", flush=True)
            if num_hosts > 1:
                seconds, told = server.lose_last_host(prompts[0])
                print(f"{num_hosts} host(s): all ended {seconds:.1f} s after the last was killed; {told}", flush=True)
            else:
                server.end()
    same = answers[0] == answers[1]
    print("the same answers" if same else f"OTHER ANSWERS: {answers}", flush=True)
    sys.exit(not same)


if __name__ == "__main__":
    main()
