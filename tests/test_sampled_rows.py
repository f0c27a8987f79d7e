"""Large steps, whose last layer computes the sampled rows alone; here each of more than 32 tokens is one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import TinyRunner, finish, greedy, load_goldens, tokens_of

from jaxserve.request import Request
from jaxserve.runner import buckets
from jaxserve.runner.buckets import Buckets


def test_the_tokens_are_the_references_and_prompts_are_scored_in_small_steps(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(buckets, "_MOST_WHOLE", 32)
    monkeypatch.setattr(Buckets, "for_platform", lambda *_: Buckets((2,), [(32, 2), (64, 2)]))  # few programs
    tiny = TinyRunner(tiny_checkpoint("mistral"), 2, slots=2, masked=False)
    steps: list[tuple[int, int]] = []
    dispatch = tiny.runner.dispatch
    monkeypatch.setattr(tiny.runner, "dispatch", lambda batch: steps.append((batch.num_tokens, batch.num_scored)) or dispatch(batch))
    prompts, continuations = load_goldens("mistral")
    engine = tiny.engine(prefix_caching=False)
    for number, (prompt, tokens) in enumerate(zip(prompts[:8], continuations, strict=False)):
        options = {"prompt_logprobs": 0} if number == 4 else {}
        engine.add_request(Request(str(number), tuple(prompt), greedy(len(tokens), **options)))
    outputs = finish(engine)
    for number, tokens in enumerate(continuations[:8]):
        assert tokens_of(outputs[str(number), 0]) == tokens
    scores = outputs["4", 0][0].prompt_logprobs
    assert scores is not None and scores.raw.shape == (len(prompts[4]) - 1,) and np.isfinite(scores.raw).all()
    assert max(tokens for tokens, scored in steps if scored) <= 32 < max(tokens for tokens, scored in steps if not scored)


def test_steps_of_prompts_are_whole_where_a_batch_of_decodes_is():
    assert Buckets.for_platform("gpu", 256, 8192, 0).max_scored_tokens == 1024
    assert Buckets.for_platform("gpu", 1500, 8192, 0).max_scored_tokens == 1536
    assert Buckets.for_platform("gpu", 256, 512, 0).max_scored_tokens == 512
    assert Buckets.deterministic(256, (16, 512)).max_scored_tokens == 512


def test_deterministic_steps_score_prompts_whichever_sizes_are_given_up():
    every = Buckets.deterministic(256, Buckets.deterministic_sizes(4096, 4096))
    for kept in (every.step_sizes[:-1], (16, 2048, 4096), (4096,)):
        scored = every.having({*kept, 4096})
        assert scored.max_scored_tokens <= every.max_scored_tokens  # what was compiled, and the room for its tokens
        assert scored.pick(scored.max_scored_tokens, 256).num_tokens <= every.max_scored_tokens
