"""Write tests/goldens: what Hugging Face transformers (float32, CPU) makes of the tiny checkpoints and of the demo model.

Run by hand in an environment with torch, transformers, gguf and numpy; not part of the tests:

    python scripts/write_goldens.py models load            # the tiny checkpoints of tests/tiny_models.py
    python scripts/write_goldens.py demo --gguf FILE       # the demo model

A golden must be able to fail and must not fail by chance: tokens vary, and the two best logits of every step are far enough
apart that the order of float32 sums does not decide. Prompts that give others are drawn again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import demo_prompts  # noqa: E402  found by the line above
import tiny_models  # noqa: E402  likewise

GOLDENS = ROOT / "tests" / "goldens"
MIN_MARGIN = 2e-3
MODEL_PROMPT_LENGTHS = (7, 90)
LOAD_MODELS = ("llama", "mistral", "qwen2-windows", "qwen3")
LOAD_PROMPTS = 32


@dataclass
class Continuation:
    """Greedy tokens after a prompt, with the logits they were chosen by: float32 [tokens, vocab]."""

    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray

    @property
    def margin(self) -> float:
        """Smallest distance between the two best logits of a step."""
        best = np.sort(self.logits, axis=1)
        return float((best[:, -1] - best[:, -2]).min())

    @property
    def logprobs(self) -> list[float]:
        """Of each token, natural logarithm."""
        logits = torch.from_numpy(self.logits)
        return torch.log_softmax(logits, -1)[torch.arange(len(self.tokens)), self.tokens].tolist()


def continue_greedily(model: Any, prompt: list[int], count: int) -> Continuation:
    """transformers' own generate, which does not stop at an end-of-sequence token here."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits).float().numpy()
    return Continuation(prompt, out.sequences[0, len(prompt) :].tolist(), logits)


def load_reference(folder: Path, **options: Any) -> Any:
    """A transformers model that samples nothing and never stops."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    model.generation_config = type(model.generation_config)(eos_token_id=None, pad_token_id=0)
    return model


def tiny_references(names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The tiny checkpoints as transformers reads them."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield name, load_reference(tiny_models.write_checkpoint(Path(folder), name))


def draw(model: Any, random: np.random.Generator, prefix: list[int], length: int, count: int, distinct: int) -> Continuation:
    """Draw prompts until one has a continuation fit for a golden: varied, without near ties, without special tokens."""
    for _ in range(200):
        special = len(tiny_models.SPECIAL_TOKENS)
        prompt = prefix[:length] + random.integers(special, tiny_models.VOCAB_SIZE - 1, max(length - len(prefix), 0)).tolist()
        found = continue_greedily(model, prompt, count)
        if found.margin > MIN_MARGIN and len(set(found.tokens)) >= distinct and min(found.tokens) >= special:
            return found
    raise SystemExit(f"no prompt of {length} tokens gives a continuation fit for a golden")


def models() -> dict[str, Any]:
    """Every tiny checkpoint: two prompts, 48 greedy tokens with their log probabilities, the logits of the last."""
    goldens = {}
    for name, model in tiny_references(tiny_models.CONFIGS):
        random = np.random.default_rng(0)
        found = [draw(model, random, [], length, 48, distinct=20) for length in MODEL_PROMPT_LENGTHS]
        goldens[name] = [
            {
                "prompt": one.prompt,
                "tokens": one.tokens,
                "margin": round(one.margin, 5),
                "logprobs": [round(value, 5) for value in one.logprobs],
                "last_logits": [round(value, 5) for value in one.logits[-1].tolist()],
            }
            for one in found
        ]
        print(name, [len(set(one.tokens)) for one in found], [round(one.margin, 4) for one in found], flush=True)
    return goldens


def load() -> dict[str, Any]:
    """Prompts of 1 to 200 tokens to be sent at once; every fourth shares a prefix of 40 tokens, some are equal up to their end."""
    goldens = {}
    for name, model in tiny_references(LOAD_MODELS):
        random = np.random.default_rng(1)
        shared = random.integers(3, tiny_models.VOCAB_SIZE - 1, 40).tolist()
        lengths = np.unique(np.geomspace(1, 200, LOAD_PROMPTS).astype(int)).tolist()
        lengths = random.permutation(lengths + random.integers(2, 200, LOAD_PROMPTS - len(lengths)).tolist()).tolist()
        found = []
        for i, length in enumerate(lengths):
            length = max(length, 48 + i) if i % 4 == 0 else length
            found.append(draw(model, random, shared if i % 4 == 0 else [], length, 24 + (i * 7) % 25, distinct=10))
        goldens[name] = [{"prompt": one.prompt, "tokens": one.tokens, "margin": round(one.margin, 5)} for one in found]
        print(name, min(one.margin for one in found), sorted(len(one.prompt) for one in found), flush=True)
    return goldens


def demo(gguf: Path) -> dict[str, Any]:
    """The demo model: 20 prompts as text and as token ids, 64 greedy tokens and their log probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = load_reference(gguf.parent, gguf_file=gguf.name)
    goldens = {}
    for name, prompt in demo_prompts.PROMPTS.items():
        text = prompt.get("text")
        if text is None:
            text = tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True, tokenize=False)
        one = continue_greedily(model, tokenizer.encode(text, add_special_tokens=False), 64)
        goldens[name] = {
            "prompt": one.prompt,
            "tokens": one.tokens,
            "margin": round(one.margin, 5),
            "logprobs": [round(value, 4) for value in one.logprobs],
            "text": tokenizer.decode(one.tokens),
        }
        print(name, len(one.prompt), len(set(one.tokens)), round(one.margin, 5), repr(goldens[name]["text"][:60]), flush=True)
    return goldens


def main() -> None:
    """Write the files that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="+", choices=("models", "load", "demo"))
    parser.add_argument("--gguf", type=Path, help="the demo model's file")
    args = parser.parse_args()
    for which in args.which:
        goldens = demo(args.gguf) if which == "demo" else {"models": models, "load": load}[which]()
        GOLDENS.mkdir(exist_ok=True)
        lines = ",\n".join(f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}" for name, value in goldens.items())
        (GOLDENS / f"{which}.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
