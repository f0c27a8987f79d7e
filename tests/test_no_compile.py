"""After warm-up no legal request compiles anything: a sweep of lengths, batch sizes and every sampling option."""

from collections.abc import Callable
from pathlib import Path

import jax
from engines import finish, tiny_runner, tokens_of

from jaxserve.request import MAX_TOP_LOGPROBS, Request, SamplingParams
from jaxserve.runner.compile import CompileEvents

OPTIONS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.6},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.7},
    "frequency": {"frequency_penalty": -0.7},
    "seed": {"seed": -5},
    "min_tokens": {"min_tokens": 4, "ignore_eos": False},
    "stop_token_ids": {"stop_token_ids": tuple(range(64))},
    "bias": {"logit_bias": {token: 3.0 for token in range(300)}},
    "logprobs": {"logprobs": MAX_TOP_LOGPROBS},
    "n": {"n": 7},
}


def test_no_legal_request_compiles(tiny_checkpoint: Callable[[str], Path]):
    engine = tiny_runner(tiny_checkpoint("llama")).engine(eos_token_ids=[0, 2])
    num_compiled = engine.stats().compile_events  # other tests compile in this process
    longest = engine.info.max_total_tokens
    number = 0

    def submit(length: int, **options: object) -> None:
        nonlocal number
        number += 1
        params = SamplingParams(**{"max_tokens": min(5, longest - length), "ignore_eos": True, **options})  # pyright: ignore
        engine.add_request(Request(f"r{number}", tuple((number * 7 + i) % 320 for i in range(length)), params))

    def check() -> None:
        for outputs in finish(engine).values():
            assert tokens_of(outputs)

    for length in [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, longest - 5, longest - 1]:
        submit(length, temperature=0.0)
        check()
    for batch in range(1, 12):
        for i in range(batch):
            submit(1 + i * 5 % 40)
        check()
    for options in OPTIONS.values():
        submit(40, **options)
        check()
    for options in OPTIONS.values():  # all at once, mixed in every step
        submit(30, **options)
    check()
    assert engine.stats().compile_events == num_compiled
    engine.check_integrity()


def test_compilations_are_counted():
    """The counter that the sweep relies on counts."""
    events = CompileEvents()
    events.start()
    jax.jit(lambda x: x * 3 + 17)(jax.numpy.arange(11)).block_until_ready()
    events.stop()
    assert events.count > 0
