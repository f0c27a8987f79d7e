"""LLM(mesh="4x1") from a script without a main guard: four processes, the tokens of one, a clear error when one dies, a clean end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import load_goldens
from few_programs import OPTIONS, Precompiled

from jaxserve import LLM
from jaxserve.cli.bench import run as bench
from jaxserve.errors import StartupError

# What it prints at import would show a second process that runs the script.
SCRIPT = """
import json, sys, time
import psutil
from jaxserve import LLM, SamplingParams
from jaxserve.errors import GenerationFailed, InvalidRequest

print("script", file=sys.stderr)
folder, cache, few_programs, prompts, lengths = json.load(sys.stdin)
llm = LLM(folder, mesh="4x1", compilation_cache_dir=cache, **few_programs)
params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
told = {"tokens": [output.outputs[0].token_ids for output in llm.generate(prompts, params)]}
try:
    llm.generate([[5] * 500])
except InvalidRequest as error:
    told["refused"] = str(error)
stream = llm.stream((n, prompts[0], params[0]) for n in range(10))
next(stream)
stream.close()  # leaves nothing behind that the next would read
told["again"] = llm.generate(prompts[3], params[3])[0].outputs[0].token_ids
time.sleep(1.0)  # statistics come twice a second
told["work"] = [stats.output_tokens for stats in llm.stats()]
told["running"] = [stats.num_running + stats.num_pages_used for stats in llm.stats()]
engines = psutil.Process().children()
told["engines"] = [engine.pid for engine in engines]
told["jax"] = "jax" in sys.modules
engines[1].suspend()  # so that what it is sent is unfinished when it is killed, however fast it is and slow this script
for _ in range(2):
    try:
        for n, _ in enumerate(llm.stream((n, prompts[n], params[n]) for n in range(len(prompts)))):
            if n == 1:
                engines[1].kill()
    except GenerationFailed as error:
        told.setdefault("errors", []).append(str(error))
json.dump(told, sys.stdout)
"""


def test_a_script_with_four_replicas(tiny_checkpoint: Callable[[str], Path], few_programs: Precompiled, tmp_path: Path):
    prompts, alone = load_goldens("llama")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    prompts, alone = [prompts[i] for i in order], [alone[i] for i in order]
    given = [str(tiny_checkpoint("llama")), str(few_programs.folder), OPTIONS, prompts, list(map(len, alone))]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, script], input=json.dumps(given), capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["tokens"] == alone and told["again"] == alone[3]
    assert "500" in told["refused"]
    assert min(told["work"]) > 0 and sum(told["work"]) >= sum(map(len, alone)) and told["running"] == [0] * 4
    assert told["errors"] == ["engine 1 was killed by SIGKILL"] * 2
    assert not told["jax"], "the script's own process needs no JAX"
    assert ran.stderr.count("script\n") == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert len(told["engines"]) == 4 and not any(Path(f"/proc/{pid}").exists() for pid in told["engines"])
    assert not list(tmp_path.glob("jaxserve-*"))


def test_replicas_that_cannot_start_are_one_line(tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(StartupError, match="needs 16 devices; there are 8") as error:
        LLM(str(tiny_checkpoint("llama")), mesh="2x16")
    assert "\n" not in str(error.value)
    with pytest.raises(StartupError, match="--mesh 1x1"):
        bench(["latency", "--mesh", "2x1", "--profile", "folder"])
