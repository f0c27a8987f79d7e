"""The demo model, as loaded from its GGUF file, gives transformers' greedy tokens (tests/goldens/demo.json), all prompts at once."""

import json
import random
from pathlib import Path

import jsonschema
import pytest
from demo_prompts import PROMPTS
from json_schemas import random_schema

from jaxserve import LLM, SamplingParams
from jaxserve.grammar import Grammar
from jaxserve.request import FinishReason

pytestmark = pytest.mark.demo

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "demo.json").read_text())


@pytest.fixture(scope="module")
def llm() -> LLM:
    # The programs of the conformance tests' server.
    return LLM(max_batch_size=4, max_batch_prefill_tokens=128, cpu_kv_cache_gib=0.5)


def test_prompts_are_tokenized_as_the_reference_does(llm: LLM):
    assert set(GOLDENS) == set(PROMPTS)
    for name, prompt in PROMPTS.items():
        if "messages" in prompt:
            token_ids = llm.tokenizer.apply_chat_template(prompt["messages"])[1]
        else:
            token_ids = llm.tokenizer.encode(prompt["text"])
        assert token_ids == GOLDENS[name]["prompt"], name


def test_its_weights_stay_quantized(llm: LLM):
    """Below 250 MB, scales and embeddings too, where float32 takes 540."""
    assert llm.info.quantization == "gguf (Q4_1, Q8_0)" and llm.info.weight_bytes < 250e6


def test_greedy_tokens_equal_transformers(llm: LLM):
    names = list(GOLDENS)
    num_compiled = llm.engines[0].stats().compile_events
    # Half of the golden tokens: test_prompt_logprobs_equal_transformers sees that each of the others is the most likely one.
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=0)
    outputs = llm.generate([GOLDENS[name]["prompt"] for name in names], params)
    for name, output in zip(names, outputs, strict=True):
        sample = output.outputs[0]
        assert sample.token_ids == GOLDENS[name]["tokens"][:32], name
        assert [logprobs.raw for logprobs in sample.logprobs] == pytest.approx(GOLDENS[name]["logprobs"][:32], abs=2e-3), name
    assert llm.engines[0].stats().compile_events == num_compiled
    llm.engines[0].check_integrity()


def test_answers_obey_random_schemas(llm: LLM):
    schemas = [random_schema(random.Random(1000 + seed)) for seed in range(8)]
    params = [SamplingParams(max_tokens=512, seed=seed, grammar=Grammar.json_schema(schema)) for seed, schema in enumerate(schemas)]
    prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Give me an example as JSON."}])[1]
    samples = [output.outputs[0] for output in llm.generate([prompt] * len(schemas), params)]
    for schema, sample in zip(schemas, samples, strict=True):
        if sample.finish_reason is FinishReason.EOS:
            jsonschema.Draft202012Validator(schema).validate(json.loads(sample.text))
    assert sum(sample.finish_reason is FinishReason.EOS for sample in samples) >= 0.9 * len(samples)


def test_prompt_logprobs_equal_transformers(llm: LLM):
    prompts = [golden["prompt"] + golden["tokens"] for golden in GOLDENS.values()]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    for golden, output in zip(GOLDENS.values(), outputs, strict=True):
        assert output.prompt_logprobs is not None
        first = len(golden["prompt"]) - 1
        assert output.prompt_logprobs.raw[first:] == pytest.approx(golden["logprobs"], abs=2e-3)
        assert (output.prompt_logprobs.ranks[first:] == 1).all()


def test_the_answers_are_the_models_own(llm: LLM):
    (output,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0.0, max_tokens=20))
    assert output.outputs[0].text == "The capital of France is Paris."
