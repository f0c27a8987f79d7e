"""An LLM with jaxserve.llm.LLM's interface whose answer is a pure function of the prompt, and that finishes prompts out of order."""

import random
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from jaxserve.errors import ContextTooLong, GenerationFailed, InvalidRequest
from jaxserve.llm import RequestOutput, SampleOutput
from jaxserve.request import EngineInfo, FinishReason, SamplingParams, TokenLogprobs

INFO = EngineInfo("double", "", "", 256, 100, 99, (0,), 16, 10, "1x1", "float32", "cpu", {"temperature": 0.5})


class ByteTokenizer:
    """A token a byte."""

    vocab_size = 256

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def chat_template(self, with_tools: bool = False) -> str:
        return "{{ messages }}"

    def special_token_id(self, text: str) -> int | None:
        return None

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], tools: Any = None, **variables: Any) -> tuple[str, list[int]]:
        if messages[0]["role"] == "refused":
            raise InvalidRequest("chat template: no such role", "messages")
        text = "".join(f"{m['role']}:{m['content']}|" for m in messages)
        return text, self.encode(text)


class LLMDouble:
    """Answers a prompt with itself in upper case, cut at max_tokens.

    Args:
        delay: seconds each answer takes.
        fail_at: the number of the prompt at which the engine gives up.
    """

    def __init__(self, delay: float = 0.0, fail_at: int = -1):
        self.info = INFO
        self.tokenizer = ByteTokenizer()
        self.params: list[SamplingParams] = []
        self.calls: list[list[tuple[int, ...]]] = []  # prompts of each generate()
        self._delay = delay
        self._fail_at = fail_at

    def stream(self, items: Iterable[tuple[Hashable, Any, SamplingParams]]) -> Iterator[tuple[Hashable, RequestOutput | InvalidRequest]]:
        """As LLM.stream: at most 8 prompts ahead, done in any order."""
        rng, source = random.Random(0), iter(items)
        running: list[tuple[Hashable, Any, SamplingParams]] = []
        count = 0
        while True:
            while len(running) < 8 and (item := next(source, None)) is not None:
                running.append(item)
            if not running:
                return
            if count == self._fail_at:
                raise GenerationFailed("the step failed")
            count += 1
            time.sleep(self._delay)
            key, prompt, params = running.pop(rng.randrange(len(running)))
            try:
                yield key, self._answer(prompt, params)
            except InvalidRequest as error:
                yield key, error

    def generate(
        self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams], use_tqdm: bool = False
    ) -> list[RequestOutput]:
        """As LLM.generate, for token ids."""
        self.calls.append([tuple(prompt) for prompt in prompts])
        time.sleep(self._delay)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        return [self._answer(prompt, p) for prompt, p in zip(prompts, each, strict=True)]

    def _answer(self, prompt: Any, params: SamplingParams) -> RequestOutput:
        params.validate(256)
        token_ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if len(token_ids) > INFO.max_input_tokens:
            raise ContextTooLong(f"the prompt has {len(token_ids)} tokens", "prompt")
        self.params.append(params)
        said = self.tokenizer.encode(self.tokenizer.decode(token_ids).upper())[: params.max_tokens]
        reason = FinishReason.EOS if len(said) == len(token_ids) else FinishReason.LENGTH
        logprobs = (
            [TokenLogprobs(-0.5, -0.5, [t, 0], [-0.5, float("-inf")], [-0.5, -9.0]) for t in said] if params.logprobs is not None else []
        )
        samples = [SampleOutput(i, self.tokenizer.decode(said), said, reason, logprobs) for i in range(params.n)]
        return RequestOutput(None, token_ids, samples, num_cached_tokens=1)
