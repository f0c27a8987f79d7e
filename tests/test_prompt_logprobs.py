"""Log probabilities of prompts, against transformers' and against each other: in chunks, beside others, preempted, cached."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import TinyRunner, finish, greedy, load_goldens, tiny_runner, tokens_of

from jaxserve.request import PromptLogprobs, Request, SamplingParams, TokenOutput

GOLDENS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "goldens" / "models.json").read_text())["llama"]


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Callable[[str], Path]) -> TinyRunner:
    return tiny_runner(tiny_checkpoint("llama"))


def scoring(num_top: int = 4, max_tokens: int = 1, **options: Any) -> SamplingParams:
    return greedy(max_tokens, prompt_logprobs=num_top, **options)


def scores_of(outputs: list[TokenOutput]) -> PromptLogprobs:
    """They come with the first output and never again."""
    first, *others = outputs
    assert first.prompt_logprobs is not None and first.token_ids and all(output.prompt_logprobs is None for output in others)
    return first.prompt_logprobs


def check(scores: PromptLogprobs, golden: dict[str, Any], num_top: int) -> None:
    """The golden tokens were greedy: each is the most likely one."""
    begin, tokens = len(golden["prompt"]) - 1, np.array(golden["tokens"])
    assert scores.raw.shape == scores.ranks.shape == (begin + len(tokens),)
    assert scores.top_raw.shape == scores.top_token_ids.shape == (begin + len(tokens), num_top)
    np.testing.assert_allclose(scores.raw[begin:], golden["logprobs"], atol=1e-4, rtol=0)
    assert (scores.ranks[begin:] == 1).all() and (scores.top_token_ids[begin:, 0] == tokens).all()
    # And the others are where their rank says.
    whole = np.array(golden["prompt"] + golden["tokens"])[1:]
    (ranked,) = np.nonzero(scores.ranks <= num_top)
    assert (scores.top_token_ids[ranked, scores.ranks[ranked] - 1] == whole[ranked]).all()
    np.testing.assert_array_equal(scores.top_raw[ranked, scores.ranks[ranked] - 1], scores.raw[ranked])
    assert (scores.raw[scores.ranks > num_top] <= scores.top_raw[scores.ranks > num_top, -1]).all()


def test_they_equal_transformers_and_cached_prompts_are_computed_again(runner: TinyRunner):
    engine = runner.engine()
    prompts = [tuple(golden["prompt"] + golden["tokens"]) for golden in GOLDENS]
    for turn in range(2):
        for number, prompt in enumerate(prompts):
            engine.add_request(Request(f"{turn}-{number}", prompt, scoring(n=2)))
        outputs = finish(engine)
        for number, golden in enumerate(GOLDENS):
            check(scores_of(outputs[f"{turn}-{number}", 0]), golden, 4)
            assert all(output.prompt_logprobs is None for output in outputs[f"{turn}-{number}", 1])
            assert outputs[f"{turn}-{number}", 0][0].num_cached_tokens == 0
    engine.check_integrity()


def test_chunks_neighbours_and_preemption_change_nothing(runner: TinyRunner):
    """Prompts of up to 200 tokens and 64 tokens a step, in a cache that holds little more than one of them."""
    prompts, continuations = load_goldens("llama")
    alone = []
    for prompt in prompts[:12]:
        engine = runner.engine(prefix_caching=False)
        engine.add_request(Request("r", tuple(prompt), scoring(0)))
        alone.append(scores_of(finish(engine)["r", 0]))
    engine = runner.engine(kv_tokens=240)
    for number, (prompt, tokens) in enumerate(zip(prompts[:12], continuations, strict=False)):
        options = {"prompt_logprobs": number % 3 * 2} if number % 4 else {}
        engine.add_request(Request(str(number), tuple(prompt), greedy(len(tokens), **options)))
    outputs = finish(engine)
    assert engine.stats().num_preemptions > 0
    for number in range(12):
        assert tokens_of(outputs[str(number), 0]) == continuations[number]
        if number % 4:
            scores = scores_of(outputs[str(number), 0])
            np.testing.assert_allclose(scores.raw, alone[number].raw, atol=1e-4, rtol=0)
            assert scores.top_raw.shape == (len(prompts[number]) - 1, number % 3 * 2)
    engine.check_integrity()


def test_a_prompt_of_one_token_has_none_and_an_abort_forgets(runner: TinyRunner):
    engine = runner.engine()
    engine.add_request(Request("one", (5,), scoring()))
    assert scores_of(finish(engine)["one", 0]).raw.shape == (0,)
    engine.add_request(Request("gone", tuple(range(3, 180)), scoring()))
    engine.step()
    engine.abort("gone")
    assert not finish(engine)
    engine.add_request(Request("gone", (5, 6, 7), scoring()))
    assert scores_of(finish(engine)["gone", 0]).raw.shape == (2,)
