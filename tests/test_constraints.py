"""Grammars in the engine: answers obey them, neighbours do not notice, and nothing that happens to a request confuses them."""

import json
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engines import Outputs, TinyRunner, ended, finish, greedy, load_goldens, run_alone, tiny_runner, tokens_of
from json_schemas import random_schema
from live_front_end import LiveFrontEnd
from tiny_models import END_OF_TURN, EOS

from jaxserve.chat_output import TOOL_CALL_PARSERS, MessageParser, answer_or_calls
from jaxserve.config import EngineOptions
from jaxserve.engine import AsyncEngine, Engine
from jaxserve.engine import constraints as constraints_module
from jaxserve.engine.build import join
from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar
from jaxserve.request import FinishReason, Request, SamplingParams, TokenOutput

ENDS = (EOS, END_OF_TURN)
PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Callable[[str], Path]) -> TinyRunner:
    return tiny_runner(tiny_checkpoint("llama"))


@pytest.fixture
def engine(runner: TinyRunner) -> Engine:
    return runner.engine(ENDS)


def params(grammar: Grammar | None, max_tokens: int = 64, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 7, "max_tokens": max_tokens, "grammar": grammar, **options})


def text_of(runner: TinyRunner, outputs: list[TokenOutput]) -> str:
    """A sample's text without the token that ended it."""
    return runner.tokenizer.decode([token for output in outputs for token in output.token_ids])


def answer(runner: TinyRunner, engine: Engine, wanted: SamplingParams) -> tuple[str, FinishReason | None]:
    """One request with the engine to itself: its text and why it ended."""
    engine.add_request(Request("r", PROMPT, wanted))
    outputs = finish(engine)["r", 0]
    return text_of(runner, outputs), outputs[-1].finish_reason


def test_random_schemas_are_obeyed_whatever_happens_to_their_requests(runner: TinyRunner, engine: Engine):
    schemas = [random_schema(random.Random(seed)) for seed in range(200)]
    num_compiled = engine.stats().compile_events  # other tests compile in this process
    for number, schema in enumerate(schemas):
        engine.add_request(Request(str(number), PROMPT, params(Grammar.json_schema(schema), 509, seed=number)))
    outputs = finish(engine)
    assert engine.stats().num_preemptions > 0 and engine.stats().compile_events == num_compiled
    engine.check_integrity()
    num_ended = 0
    for number, schema in enumerate(schemas):
        sample = outputs[str(number), 0]
        assert sample[-1].finish_reason in (FinishReason.EOS, FinishReason.LENGTH), sample[-1].error
        if sample[-1].finish_reason is FinishReason.EOS:
            num_ended += 1
            validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
            validator.validate(json.loads(text_of(runner, sample)))
    assert num_ended >= 0.9 * len(schemas)


@pytest.fixture(scope="module")
def live(runner: TinyRunner, tiny_checkpoint: Callable[[str], Path]) -> Iterator[LiveFrontEnd]:
    """The tiny model behind the real front end."""
    folder = tiny_checkpoint("llama")
    engine = runner.engine(ENDS)
    engine.info = replace(engine.info, model_path=str(folder))
    front_end = LiveFrontEnd(folder, engine=AsyncEngine(engine, 64))
    front_end.start()
    yield front_end
    front_end.stop()


def asked_and_told(number: int, schema: dict[str, Any]) -> tuple[str, dict[str, Any], Callable[[dict[str, Any]], tuple[str, bool]]]:
    """A way to ask for a schema over HTTP: route, body, and what takes the text out of the answer, and whether it ended by itself."""
    sampling = {"temperature": 1.0, "seed": number}
    match number % 4:
        case 0:
            told_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
            messages = [{"role": "user", "content": "a"}]
            return (
                "/v1/chat/completions",
                {"messages": messages, "max_tokens": 440, "response_format": told_format, **sampling},
                lambda told: (told["choices"][0]["message"]["content"], told["choices"][0]["finish_reason"] == "stop"),
            )
        case 1:
            return (
                "/v1/completions",
                {"prompt": "a", "max_tokens": 440, "guided_json": schema, **sampling},
                lambda told: (told["choices"][0]["text"], told["choices"][0]["finish_reason"] == "stop"),
            )
        case 2:
            parameters = {
                "max_new_tokens": 440,
                "details": True,
                "grammar": {"type": "json", "value": schema},
                "do_sample": True,
                **sampling,
            }
            return (
                "/generate",
                {"inputs": "a", "parameters": parameters},
                lambda told: (told["generated_text"], told["details"]["finish_reason"] == "eos_token"),
            )
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    return (
        "/v1/responses",
        {"input": "a", "max_output_tokens": 440, "text": text, **sampling},
        lambda told: (told["output"][0]["content"][0]["text"], told["status"] == "completed"),
    )


def test_random_schemas_over_http(live: LiveFrontEnd):
    """Of every four one for each of the fields that take a schema; all at once."""
    schemas = [random_schema(random.Random(400 + number)) for number in range(40)]

    def ask(number: int) -> bool:
        path, body, told = asked_and_told(number, schemas[number])
        answer = live.client.post(path, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        text, ended = told(answer.json())
        if ended:
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(schemas[number], format_checker=checker).validate(json.loads(text))
        return ended

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(ask, range(len(schemas)))) >= 0.9 * len(schemas)
    assert live.idle()


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
def test_an_answer_by_its_schema_or_calls(runner: TinyRunner, engine: Engine, name: str):
    tool_format = TOOL_CALL_PARSERS[name]
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"], "additionalProperties": False}
    arguments = {**schema, "properties": {"n": {"enum": [1, 2]}}}
    either = answer_or_calls(Grammar.json_schema(schema), tool_format, [("f", arguments), ("g", arguments)], False, None, "")
    for seed in range(8):
        engine.add_request(Request(str(seed), PROMPT, params(either, 120, seed=seed, temperature=5000.0)))
    num_calls, outputs = 0, finish(engine)
    for sample in outputs.values():
        assert sample[-1].finish_reason is FinishReason.EOS, sample[-1].error
        parser = MessageParser(tool_format, ("f", "g"), alone=True)
        delta = parser.push(text_of(runner, sample), last=True)
        num_calls += parser.num_calls
        assert (parser.num_calls == 1) == (delta.content == "")
        jsonschema.validate(json.loads(delta.content or delta.tool_calls[0].arguments), schema)
    assert 0 < num_calls < len(outputs)  # every token that is allowed is as likely as the others


def test_neighbours_get_what_they_get_alone(runner: TinyRunner):
    prompts, continuations = (goldens[:4] for goldens in load_goldens("llama"))
    wanted = params(Grammar.regex("[a-z]{40}"), seed=3)
    alone = run_alone(runner.engine(ENDS), PROMPT, wanted)
    for sync in (False, True):
        engine = runner.engine(ENDS, sync=sync)
        for number, (prompt, tokens) in enumerate(zip(prompts, continuations, strict=True)):
            engine.add_request(Request(f"free{number}", tuple(prompt), greedy(len(tokens))))
        engine.add_request(Request("constrained", PROMPT, wanted))
        outputs = finish(engine)
        assert [tokens_of(outputs[f"free{number}", 0]) for number in range(4)] == continuations
        assert tokens_of(outputs["constrained", 0]) == alone


def test_samples_of_one_prompt_follow_the_grammar_each_on_its_own(runner: TinyRunner, engine: Engine):
    grammar = Grammar.regex("[0-9]{5}x[a-f]+y")
    long = tuple(range(3, 80))
    engine.add_request(Request("first", long, params(grammar, n=4)))
    texts = {text_of(runner, outputs) for outputs in finish(engine).values()}
    engine.add_request(Request("again", long, params(grammar, n=4)))  # a prefix hit
    again = finish(engine)
    assert again["again", 0][-1].num_cached_tokens > 0
    assert {text_of(runner, outputs) for outputs in again.values()} == texts and len(texts) == 4
    assert all(re.fullmatch("[0-9]{5}x[a-f]+y?", text) for text in texts)


def test_a_complete_grammar_ends_the_sample(runner: TinyRunner, engine: Engine):
    three = Grammar.regex("[0-9]{3}")
    assert answer(runner, engine, params(three))[1] is FinishReason.EOS
    # Where no end-of-sequence token may end it, it ends without one.
    for options in ({"ignore_eos": True}, {"min_tokens": 30}, {"min_tokens": 30, "stop_token_ids": (9,)}):
        text, reason = answer(runner, engine, params(three, **options))
        assert re.fullmatch("[0-9]{3}", text) and reason is FinishReason.STOP
    text, reason = answer(runner, runner.engine(()), params(three))  # a model without such tokens
    assert re.fullmatch("[0-9]{3}", text) and reason is FinishReason.STOP


def test_the_least_tokens_are_reached_where_the_grammar_can_go_on(runner: TinyRunner, engine: Engine):
    text, reason = answer(runner, engine, params(Grammar.regex("[0-9]+"), min_tokens=30))
    assert re.fullmatch("[0-9]{30,}", text) and reason in (FinishReason.EOS, FinishReason.LENGTH)
    text, reason = answer(runner, engine, params(Grammar.regex("[0-9]+"), max_tokens=50, ignore_eos=True))
    assert re.fullmatch("[0-9]{50}", text) and reason is FinishReason.LENGTH


def test_bias_and_penalties_choose_within_the_grammar(runner: TinyRunner, engine: Engine):
    (seven,) = runner.tokenizer.encode("7", add_special_tokens=False)
    options = {"logit_bias": {seven: 100.0, 99: 100.0}, "logprobs": 3, "repetition_penalty": 1.2}
    engine.add_request(Request("r", PROMPT, params(Grammar.regex("[0-9]{4}"), **options)))
    outputs = finish(engine)["r", 0]
    assert text_of(runner, outputs) == "7777"
    assert outputs[0].logprobs[0].processed == pytest.approx(0.0, abs=1e-5) and outputs[0].logprobs[0].raw < -1


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another"])
def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(engine: Engine, alone: bool):
    if not alone:
        engine.add_request(Request("other", PROMPT, greedy(20)))
    engine.add_request(Request("bad", PROMPT, params(Grammar.regex("(a", "guided_regex"), n=2)))
    outputs = finish(engine)
    for index in range(2):
        (last,) = outputs["bad", index]
        assert last.finish_reason is FinishReason.INVALID
        assert last.error.startswith("`guided_regex`: the grammar cannot be compiled:") and "unclosed group" in last.error
    assert alone or len(tokens_of(outputs["other", 0])) == 20
    engine.check_integrity()


def test_a_grammar_that_explodes_on_the_way_ends_its_request_alone(engine: Engine):
    engine.add_request(Request("other", PROMPT, greedy(20)))
    # Behind the first bracket there are more ways to go on than llguidance follows.
    many = Grammar.json_schema({"type": "object", "properties": {f"v{i}": {"type": "integer"} for i in range(1000)}})
    engine.add_request(Request("bad", PROMPT, params(many, n=2)))
    outputs = finish(engine)
    assert {outputs["bad", index][-1].finish_reason for index in range(2)} == {FinishReason.INVALID}
    assert "cannot be followed any further" in outputs["bad", 0][-1].error
    assert len(tokens_of(outputs["other", 0])) == 20
    engine.check_integrity()


def test_a_request_whose_grammar_is_being_compiled_blocks_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    slow = Grammar.json_schema({"type": "object", "properties": {f"v{i}": {"type": "integer"} for i in range(3000)}})
    engine.add_request(Request("slow", PROMPT, params(slow, 2, n=2)))
    engine.add_request(Request("free", PROMPT, greedy(5)))
    engine.add_request(Request("quick", PROMPT, params(Grammar.choice(["yes", "no"]))))
    order: list[str] = []
    while engine.has_work:
        order += [output.request_id for output in engine.step() if output.finish_reason is not None]
    assert order[-2:] == ["slow", "slow"] and set(order) == {"slow", "free", "quick"}
    # And after a time it is given up.
    monkeypatch.setattr(constraints_module, "COMPILE_TIME_LIMIT", 0.0)
    engine.add_request(Request("late", PROMPT, params(Grammar.json_schema({**json.loads(slow.text), "title": "another"}))))
    (last,) = finish(engine)["late", 0]
    assert last.finish_reason is FinishReason.INVALID and "longer than" in last.error


def test_aborts_leave_nothing_behind(engine: Engine):
    endless = Grammar.regex("[a-z]+")
    engine.add_request(Request("a", PROMPT, params(endless, 500, ignore_eos=True, n=3)))
    engine.add_request(Request("b", PROMPT, params(endless, 40, ignore_eos=True)))
    engine.add_request(Request("compiling", PROMPT, params(Grammar.regex("[a-z]+x"), 500)))
    engine.abort("compiling")
    for _ in range(5):
        engine.step()
    engine.abort("a", 1)
    engine.step()
    engine.abort("a")
    assert {request_id for request_id, _ in finish(engine)} == {"b"}
    engine.check_integrity()
    assert not engine.has_work


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled(engine: Engine):
    slow = [Grammar.json_schema({"title": f"s{i}", "properties": {f"v{j}": {"type": "integer"} for j in range(3000)}}) for i in range(2)]
    for number, grammar in enumerate(slow):
        engine.add_request(Request(f"slow{number}", PROMPT, params(grammar, 2)))
    for name in ("a", "b"):
        engine.add_request(Request(name, PROMPT, params(Grammar.regex("shared[a-z]"))))
    engine.add_request(Request("alone", PROMPT, params(Grammar.regex("alone[a-z]"))))
    assert engine._constraints is not None
    waiting = dict(engine._constraints._compiling)
    engine.abort("a")
    engine.abort("alone")
    assert waiting["alone"].compilation.future.cancelled() and not waiting["b"].compilation.future.cancelled()
    ends = finish(engine)
    assert ends["b", 0][-1].finish_reason in (FinishReason.EOS, FinishReason.STOP)
    engine.check_integrity()


def test_a_server_waits_for_grammars_without_spinning_and_gives_permits_back(engine: Engine):
    outputs = Outputs()
    server = AsyncEngine(engine, max_concurrent_requests=2)
    server.submit(Request("bad", PROMPT, params(Grammar.regex("(b"), n=2)), outputs)
    server.submit(Request("good", PROMPT, params(Grammar.regex("[a-z]{5}"))), outputs)
    ends = {output.request_id: output.finish_reason for output in outputs.wait(ended(3)) if output.finish_reason}
    assert ends == {"bad": FinishReason.INVALID, "good": FinishReason.EOS}
    assert server.drain(10) and server.num_permits_held == 0
    server.submit(Request("left", PROMPT, params(Grammar.json_object())), outputs)
    server.close()
    assert outputs.all[-1].finish_reason is not None


def test_an_engine_without_grammars_says_so(runner: TinyRunner, engine: Engine):
    engine = join(runner.runner, runner.config, EngineOptions(), engine.info, "for a reason")
    with pytest.raises(InvalidRequest, match="for a reason") as caught:
        engine.add_request(Request("r", PROMPT, params(Grammar.json_object())))
    assert caught.value.param == "response_format"


def test_the_error_of_a_step_that_could_not_be_sampled_is_not_hidden_by_close(
    runner: TinyRunner, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    unsampled: list[Any] = []

    def fail(step: Any, masks: Any) -> None:
        unsampled.append(step)
        raise RuntimeError("no memory for masks")

    monkeypatch.setattr(runner.runner, "sample", fail)
    engine.add_request(Request("r", PROMPT, params(Grammar.regex("[a-z]{5}"))))
    with pytest.raises(RuntimeError, match="no memory for masks"):
        finish(engine)
    engine.close()
    monkeypatch.undo()
    runner.runner.sample(unsampled[0])  # other tests go on with the runner
    runner.runner.collect(unsampled[0])
