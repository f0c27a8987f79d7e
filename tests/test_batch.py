"""Batch generation: what lines say, what records say, order, and that a killed run loses and repeats nothing."""

import fcntl
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llm_double import LLMDouble

from jaxserve import cli
from jaxserve.batch.options import BatchOptions
from jaxserve.batch.run import Summary, run_batch
from jaxserve.errors import GenerationFailed, StartupError

TESTS = Path(__file__).resolve().parent


def run(source: Path, output: Path, llm: LLMDouble | None = None, identity: dict[str, Any] | None = None, **options: Any) -> Summary:
    return run_batch(BatchOptions(str(source), str(output), **options), identity or {}, lambda: llm or LLMDouble())  # type: ignore[arg-type, return-value]


def answer(tmp_path: Path, lines: list[Any], llm: LLMDouble | None = None, **options: Any) -> list[dict[str, Any]]:
    """The records of lines, each a JSON value or a text as it is."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    run(source, output, llm, **options)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_answers_come_in_order_with_their_ids(tmp_path: Path) -> None:
    records = answer(tmp_path, [{"prompt": f"word {i}"} for i in range(50)] + [{"id": "x", "prompt": "abc"}])
    assert [r["outputs"][0]["text"] for r in records] == [f"WORD {i}" for i in range(50)] + ["ABC"]
    assert [r["id"] for r in records] == [*range(1, 51), "x"]
    assert records[0]["outputs"] == [{"text": "WORD 0", "finish_reason": "eos", "completion_tokens": 6}]
    assert (records[0]["prompt_tokens"], records[0]["cached_tokens"]) == (6, 1)


def test_fields_of_a_line(tmp_path: Path) -> None:
    llm = LLMDouble()
    (one, two, three, four) = answer(
        tmp_path,
        [
            {"prompt": "abcdef", "max_tokens": 2, "n": 2, "stop": "x", "temperature": 0, "logit_bias": {"5": 1.5}},
            {"messages": [{"role": "user", "content": "hi"}]},
            {"prompt": [104, 105], "top_k": 3, "logprobs": 1},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]},
        ],
        llm,
        seed=9,
        stop=("end",),
    )
    assert [o["text"] for o in one["outputs"]] == ["AB", "AB"] and one["outputs"][0]["finish_reason"] == "length"
    assert two["outputs"][0]["text"] == "USER:HI|" and four["outputs"][0]["text"] == "USER:PARTS|"
    assert three["outputs"][0]["logprobs"][0] == {"token_id": 72, "logprob": -0.5, "top": [[72, -0.5], [0, None]]}
    by_tokens = {p.max_tokens: p for p in llm.params}
    assert by_tokens[2].stop == ("x",) and by_tokens[2].temperature == 0 and by_tokens[2].logit_bias == {5: 1.5}
    assert by_tokens[256].stop == ("end",) and by_tokens[256].temperature == 0.5  # the flag's; the model's own default
    assert {p.seed for p in llm.params} == {9}


BAD_LINES = [
    ("{", None),
    ("[]", None),
    ("null", None),
    ("\xff\xfe", None),
    ({}, "prompt"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": "a", "temprature": 1}, "temprature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ('{"prompt": "a", "temperature": NaN}', "temperature"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "top_p": 2}, "top_p"),
    ({"prompt": "a", "stop": 5}, "stop"),
    ({"prompt": "a", "logit_bias": [1]}, "logit_bias"),
    ({"prompt": "a", "guided_json": 5}, "guided_json"),
    ({"prompt": "a" * 200}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "refused", "content": "x"}]}, "messages"),
    ("[" * 100_000, None),
]


def test_bad_lines_get_records_and_stop_nothing(tmp_path: Path) -> None:
    lines = [line for bad, _ in BAD_LINES for line in (bad, {"prompt": "good"})]
    records = answer(tmp_path, lines)
    assert len(records) == len(lines)
    for record, (bad, param) in zip(records[::2], BAD_LINES, strict=True):
        assert record["error"]["param"] == param and record["error"]["message"] and "outputs" not in record, bad
    assert all(r["outputs"][0]["text"] == "GOOD" and "error" not in r for r in records[1::2])


def test_openai_lines_are_answered_in_openais_shape(tmp_path: Path) -> None:
    llm = LLMDouble()
    chat = {
        "model": "gpt-5",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 1,
    }
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["one", "two"], "n": 2, "echo": True}},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "lp", "logprobs": 1}},
        {"prompt": "mixed in"},
    ]
    one, two, three, four = answer(tmp_path, lines, llm, max_tokens=50)
    assert one["custom_id"] == "a" and one["error"] is None and one["response"]["status_code"] == 200
    body = one["response"]["body"]
    assert body["object"] == "chat.completion" and body["model"] == "double"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "USER", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "length"
    entry = body["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"], entry["top_logprobs"][0]["logprob"]) == ("U", [85], -0.5)
    assert entry["top_logprobs"][1]["logprob"] == -9999.0
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 1}}
    choices = two["response"]["body"]["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3] and [c["text"] for c in choices] == ["oneONE", "oneONE", "twoTWO", "twoTWO"]
    assert three["response"]["body"]["choices"][0]["logprobs"]["text_offset"] == [0, 1]
    assert four["outputs"][0]["text"] == "MIXED IN"
    assert {p.max_tokens for p in llm.params} == {4, 50}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"method": "GET"}, 400, "method"),
        ({"url": "/v1/embeddings"}, 400, "url"),
        ({"body": None}, 400, "body"),
        ({"body": {"prompt": "a", "stream": True}}, 400, "stream"),
        ({"body": {"prompt": []}}, 400, "prompt"),
        ({"body": {"prompt": ["a", "b" * 200]}}, 400, "prompt"),
        ({"body": {"prompt": "a", "n": 0}}, 400, "n"),
    ],
)
def test_bad_openai_lines(change: dict[str, Any], status: int, param: str, tmp_path: Path) -> None:
    line = {"custom_id": "z", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}
    bad, good = answer(tmp_path, [{**line, **change}, line])
    assert bad["custom_id"] == "z" and bad["response"]["status_code"] == status
    assert bad["response"]["body"]["error"]["param"] == param
    assert good["response"]["status_code"] == 200


def test_text_lines(tmp_path: Path) -> None:
    source, output = tmp_path / "prompts", tmp_path / "out"
    source.write_text("first line\n\n  \nsecond é\r\nlast")
    summary = run(source, output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["id"], r["outputs"][0]["text"]) for r in records] == [(1, "FIRST LINE"), (4, "SECOND É"), (5, "LAST")]
    assert (summary.answered, summary.refused, summary.output_tokens) == (3, 0, 10 + 9 + 4)


def test_every_cut_is_repaired(tmp_path: Path) -> None:
    """A kill can leave any number of bytes: from each, the run goes on to the same file."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"wörd {i}"}) + "\n" for i in range(4)))
    run(source, output)
    whole = output.read_bytes()
    for size in range(len(whole) + 1):
        output.write_bytes(whole[:size])
        summary = run(source, output)
        assert output.read_bytes() == whole, size
        assert summary.resumed == whole[:size].count(b"\n") and summary.resumed + summary.answered == 4


def test_a_run_killed_again_and_again_loses_and_repeats_nothing(tmp_path: Path) -> None:
    source, output, reference = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "reference.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"word {i}" * 8}) + "\n" for i in range(300)) + "not json\n")
    run(source, reference)
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(TESTS / "batch_kills.py"), str(source), str(output), "12"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    resumed, answered = map(int, done.stdout.split()[-2:])
    assert resumed > 0 and answered > 0 and resumed + answered == 300  # the line that is refused is not counted
    assert output.read_bytes() == reference.read_bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lines": ["b", "a"]}, "record 1 does not answer line 1"),
        ({"lines": ["a"]}, "more records than the input has lines"),
        ({"temperature": 0.7}, "record 1 does not answer line 1"),
        ({"identity": {"model_id": "other"}}, "record 1 does not answer line 1"),
        ({"output": b"My novel.\nChapter one.\n"}, "record 1 does not answer line 1"),
        ({"output": b"My novel, all in one line"}, "does not end in an answer"),
        ({"output": b"\0" * 100}, "does not end in an answer"),
    ],
)
def test_an_output_of_something_else_is_refused_and_left_alone(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a\nb\n")
    run(source, output)
    source.write_text("".join(line + "\n" for line in change.pop("lines", ["a", "b"])))
    output.write_bytes(change.pop("output", output.read_bytes()))
    before = output.read_bytes()
    with pytest.raises(StartupError, match=told):
        run(source, output, **change)
    assert output.read_bytes() == before


def test_a_finished_run_loads_no_model(tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a\nb\n")
    run(source, output)

    def load() -> Any:
        raise AssertionError("loaded")

    assert run_batch(BatchOptions(str(source), str(output)), {}, load).resumed == 2
    source.write_text("a\nb\nc\n")  # an input that has grown is continued
    summary = run(source, output)
    assert (summary.resumed, summary.answered, summary.refused, summary.output_tokens) == (2, 1, 0, 1)


def test_two_runs_on_one_output_are_refused(tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a\n")
    with open(output, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StartupError, match="another run"):
            run(source, output)


def test_a_failed_engine_leaves_what_was_written(tmp_path: Path) -> None:
    source, output, reference = tmp_path / "in.txt", tmp_path / "out.jsonl", tmp_path / "reference"
    source.write_text("".join(f"line {i}\n" for i in range(40)))
    run(source, reference)
    with pytest.raises(GenerationFailed):
        run(source, output, LLMDouble(fail_at=20))
    assert 0 < output.read_bytes().count(b"\n") <= 20
    run(source, output)
    assert output.read_bytes() == reference.read_bytes()


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot read .*: No such file"):
        run(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in").write_text("a")
    with pytest.raises(StartupError, match=r"cannot write .*: No such file"):
        run(tmp_path / "in", tmp_path / "no" / "out")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("jaxserve.llm.LLM", lambda **options: made.append(options) or LLMDouble())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "ab"}\n{"prompt": 1}\n')))
    assert cli.main(["generate", "--mesh", "1x2", "--model-id", "m", "--temperature", "0"]) == 0
    told = capfd.readouterr()
    assert [json.loads(line)["id"] for line in told.out.splitlines()] == [1, 2]
    assert "1 answered, 1 refused, 2 tokens" in told.err
    assert made[0]["mesh"] == "1x2" and made[0]["model_id"] == "m"
    assert cli.main(["generate", "-i", str(tmp_path / "none")]) == 1
    assert capfd.readouterr().err == f"jaxserve: cannot read {tmp_path / 'none'}: No such file or directory\n"
