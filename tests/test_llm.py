"""LLM in this process, on a tiny checkpoint: texts, chats, stop strings, seeds, samples, streams."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import kept_programs, load_goldens

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.errors import ContextTooLong, InvalidRequest, StartupError
from jaxserve.grammar import Grammar
from jaxserve.request import FinishReason

# Room for less than three of the longest requests; a token's K and V in float32, 4 heads of 8, 2 layers.
KV_TOKENS, TOKEN_BYTES = 640, 2 * 4 * 4 * 8 * 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Callable[[str], Path]) -> LLM:
    """Of the sizes that a TinyRunner has, whose programs it takes where other tests left them."""
    return LLM(
        str(tiny_checkpoint("llama")),
        max_batch_size=4,
        max_batch_prefill_tokens=64,
        max_total_tokens=512,
        cpu_kv_cache_gib=KV_TOKENS * TOKEN_BYTES / 2**30,
        compilation_cache_dir=kept_programs(tiny_checkpoint("llama")),
    )


def test_every_prompt_gets_its_answer_whatever_its_place(llm: LLM):
    prompts = ["one", "the two of them", [5, 6, 7], "x" * 90, "last"]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in outputs] == ["one", "the two of them", None, "x" * 90, "last"]
    assert all(len(o.outputs[0].token_ids) == 20 and o.outputs[0].finish_reason is FinishReason.LENGTH for o in outputs)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 5
    backwards = llm.generate(prompts[::-1], GREEDY)
    assert [o.outputs[0].token_ids for o in backwards[::-1]] == [o.outputs[0].token_ids for o in outputs]
    for output in outputs:
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)


def test_the_engine_is_left_clean(llm: LLM):
    before = [engine.stats().output_tokens for engine in llm.engines]
    llm.generate([f"prompt {i}" for i in range(6)], GREEDY)
    for engine, count in zip(llm.engines, before, strict=True):
        assert engine.stats().output_tokens > count
        assert engine.stats().num_pages_used == 0
        engine.check_integrity()


def test_grammars_and_prompt_logprobs(llm: LLM):
    digits = SamplingParams(max_tokens=20, seed=1, grammar=Grammar.regex("[0-9]{3}"), prompt_logprobs=2)
    outputs = llm.generate(["one", "two", "three"], digits)
    assert all(re.fullmatch("[0-9]{3}", output.outputs[0].text) for output in outputs)
    assert [len(output.prompt_logprobs.raw) for output in outputs if output.prompt_logprobs] == [
        len(o.prompt_token_ids) - 1 for o in outputs
    ]
    bad = SamplingParams(max_tokens=20, grammar=Grammar.regex("(", "guided_regex"))
    with pytest.raises(InvalidRequest, match="`guided_regex`: the grammar cannot be compiled"):
        llm.generate(["one", "two"], [digits, bad])
    results = dict(llm.stream((number, "x", params) for number, params in enumerate([digits, bad, digits])))
    assert isinstance(results[1], InvalidRequest) and isinstance(results[0], RequestOutput) and isinstance(results[2], RequestOutput)
    for engine in llm.engines:
        engine.check_integrity()


def test_load_changes_no_token(llm: LLM):
    prompts, alone = load_goldens("llama")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # Longer than what is known of them, so that they grow out of the cache.
    params = [SamplingParams(temperature=0.0, max_tokens=len(alone[i]) + 100, ignore_eos=True) for i in order]
    outputs = llm.generate([prompts[i] for i in order], params)
    assert [o.outputs[0].token_ids[: len(alone[i])] for i, o in zip(order, outputs, strict=True)] == [alone[i] for i in order]
    assert sum(engine.stats().num_preemptions for engine in llm.engines) > 0, "the cache was meant to be too small"


def test_a_stop_string_ends_the_text_before_it(llm: LLM):
    (whole,) = llm.generate("where is it", GREEDY)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop=(stop,))
    (output,) = llm.generate("where is it", params)
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].finish_reason is FinishReason.STOP
    assert len(output.outputs[0].token_ids) < 20


def test_a_stop_string_of_one_sample_leaves_the_others(llm: LLM):
    params = SamplingParams(max_tokens=24, ignore_eos=True, seed=3, n=3)
    (free,) = llm.generate("many ways", params)
    texts = [o.text for o in free.outputs]
    stop = next(texts[0][i : i + 4] for i in range(len(texts[0]) - 4) if all(texts[0][i : i + 4] not in text for text in texts[1:]))
    (output,) = llm.generate("many ways", SamplingParams(max_tokens=24, ignore_eos=True, seed=3, n=3, stop=(stop,)))
    assert [o.text for o in output.outputs] == [texts[0][: texts[0].index(stop)], *texts[1:]]


def test_a_seed_gives_the_same_tokens_beside_others(llm: LLM):
    params = SamplingParams(seed=42, max_tokens=16, top_p=0.9, ignore_eos=True)
    (alone,) = llm.generate("seeded", params)
    crowd = llm.generate(["other", "seeded", "more", "seeded"], [GREEDY, params, SamplingParams(max_tokens=7), params])
    assert crowd[1].outputs[0].token_ids == crowd[3].outputs[0].token_ids == alone.outputs[0].token_ids
    (other,) = llm.generate("seeded", SamplingParams(seed=43, max_tokens=16, top_p=0.9, ignore_eos=True))
    assert other.outputs[0].token_ids != alone.outputs[0].token_ids


def test_logprobs_come_with_every_token(llm: LLM):
    (output,) = llm.generate("probable", SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2))
    assert len(output.outputs[0].logprobs) == 5
    for token, logprobs in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        assert logprobs.top_token_ids[0] == token and logprobs.top_raw[0] == pytest.approx(logprobs.raw)
        assert len(logprobs.top_token_ids) == 2 and logprobs.top_raw[1] <= logprobs.top_raw[0] <= 0


def test_chat_renders_the_template(llm: LLM):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert llm.tokenizer.decode(list(output.prompt_token_ids), skip_special_tokens=False) == "<|begin|>user: hi<|turn|>\nassistant: "
    pair = llm.chat([messages, messages], GREEDY)
    assert [o.outputs[0].token_ids for o in pair] == [output.outputs[0].token_ids] * 2


def test_stream_pulls_prompts_lazily_and_tells_what_cannot_be_served(llm: LLM):
    pulled = 0

    def items() -> Iterator[tuple[int, str | list[int], SamplingParams]]:
        nonlocal pulled
        for i in range(60):
            pulled += 1
            yield i, [999] if i == 3 else f"prompt {i}", SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

    stream = llm.stream(items())
    seen = dict([next(stream)])
    assert pulled < 40
    seen |= dict(stream)
    assert sorted(seen) == list(range(60)) and isinstance(seen[3], InvalidRequest)
    assert all(isinstance(o, RequestOutput) and len(o.outputs[0].token_ids) == 4 for i, o in seen.items() if i != 3)


def test_a_stream_left_early_leaves_nothing_behind(llm: LLM):
    stream = llm.stream((i, f"prompt {i}", GREEDY) for i in range(10))
    next(stream)
    stream.close()
    llm.generate("afterwards", GREEDY)
    for engine in llm.engines:
        while engine.has_work:
            engine.step()
        assert engine.stats().num_pages_used == 0
        engine.check_integrity()


def test_refusals(llm: LLM):
    with pytest.raises(ContextTooLong):
        llm.generate([5] * 600, GREEDY)
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("x", SamplingParams(temperature=float("nan")))
    with pytest.raises(InvalidRequest, match="sampling params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(StartupError, match="no_such_option"):
        LLM("x", no_such_option=1)
    # As the command line refuses them, and before the model is looked for.
    for options in ({"kv_cache_dtype": "bfloat16"}, {"quantize": "exl3"}, {"quantize": 8}, {"max_batch_size": 0}, {"max_batch_size": "8"}):
        with pytest.raises(StartupError, match=f"--{next(iter(options)).replace('_', '-')} must be"):
            LLM("x", **options)


def test_a_mesh_larger_than_the_devices_is_one_line(tiny_checkpoint: Callable[[str], Path]):
    with pytest.raises(StartupError, match="16") as error:
        LLM(str(tiny_checkpoint("llama")), mesh="1x16")
    assert "\n" not in str(error.value)
