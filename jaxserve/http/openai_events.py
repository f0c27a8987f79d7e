"""Answers streamed as OpenAI's chunks, one event a token.

An event is put together from strings that are ready but for the token's text: every token costs one, and nothing in the http process is
done more often.
"""

from collections.abc import Sequence
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.http.answer import Answers, SampleToken
from jaxserve.http.errors import error_event, failure_kind
from jaxserve.http.openai_rendering import chat_logprobs, completion_logprobs, finish_reason, usage
from jaxserve.http.service import Service
from jaxserve.http.sse import DONE, compact, quoted

USAGE_LATER = ',"usage":null'


class ChatEvents:
    """Chunks of /v1/chat/completions (see sse.Events): each choice begins with its role.

    Args:
        service: tokenizer and metrics.
        answers: to be read.
        head: what each chunk begins with.
        include_usage: the last chunk tells the usage, all others `"usage": null`.
    """

    kind = "chat.completion.chunk"

    def __init__(self, service: Service, answers: Answers, head: dict[str, Any], include_usage: bool):
        self._service = service
        self._answers = answers
        self._include_usage = include_usage
        self._head = "data: " + compact({**head, "object": self.kind})[:-1] + (USAGE_LATER if include_usage else "")
        choices = [sample.choice for sample in answers.samples]
        self._opening = [self._head + self._choice_opening(choice) for choice in choices]
        self._closing = self._choice_closing("null", "null")
        self._unopened = {choice: self._first_event(choice) for choice in choices}
        self._over = False

    async def read(self) -> bytes:
        if self._over:
            return b""
        tokens = await self._answers.read()
        if not tokens:
            self._over = True
            return self._last_events().encode()
        parts: list[str] = []
        opening, closing = self._opening, self._closing
        for token in tokens:
            choice = token.sample.choice
            if self._unopened and choice in self._unopened:
                parts.append(self._unopened.pop(choice))
            plain = token.logprobs is None and token.finish_reason is None
            parts += (opening[choice], quoted(token.text), closing if plain else self._token_closing(token))
        return "".join(parts).encode()

    def failed(self, error: JaxserveError) -> bytes:
        self._service.metrics.tgi_failure.labels(failure_kind(error)).inc()
        return (error_event("/v1/", error) + DONE).encode()

    def abort(self) -> None:
        self._answers.abort()

    def _choice_opening(self, choice: int) -> str:
        return f',"choices":[{{"index":{choice},"delta":{{"content":'

    def _choice_closing(self, logprobs: str, reason: str) -> str:
        return f'}},"logprobs":{logprobs},"finish_reason":{reason}}}]}}\n\n'

    def _first_event(self, choice: int) -> str:
        delta = '{"role":"assistant","content":""}'
        return f'{self._head},"choices":[{{"index":{choice},"delta":{delta},"logprobs":null,"finish_reason":null}}]}}\n\n'

    def _token_closing(self, token: SampleToken) -> str:
        logprobs = None if token.logprobs is None else self._logprobs(token)
        reason = None if token.finish_reason is None else finish_reason(token.sample)
        return self._choice_closing(compact(logprobs), compact(reason))

    def _logprobs(self, token: SampleToken) -> dict[str, Any]:
        return chat_logprobs([token], self._service.tokenizer)

    def _last_events(self) -> str:
        if not self._include_usage:
            return DONE
        head = self._head.removesuffix(USAGE_LATER)
        return f'{head},"choices":[],"usage":{compact(usage(self._answers))}}}\n\n{DONE}'


class CompletionEvents(ChatEvents):
    """Chunks of /v1/completions: each choice begins with its echo, where asked for.

    Args:
        echoes: what goes before each choice's text.
    """

    kind = "text_completion"

    def __init__(self, service: Service, answers: Answers, head: dict[str, Any], include_usage: bool, echoes: Sequence[str]):
        self._echoes = echoes
        self._offsets = [0] * len(echoes)
        super().__init__(service, answers, head, include_usage)
        self._unopened = {choice: event for choice, event in self._unopened.items() if echoes[choice]}

    def _choice_opening(self, choice: int) -> str:
        return f',"choices":[{{"index":{choice},"text":'

    def _choice_closing(self, logprobs: str, reason: str) -> str:
        return f',"logprobs":{logprobs},"finish_reason":{reason}}}]}}\n\n'

    def _first_event(self, choice: int) -> str:
        return self._head + self._choice_opening(choice) + quoted(self._echoes[choice]) + self._choice_closing("null", "null")

    def _logprobs(self, token: SampleToken) -> dict[str, Any]:
        choice = token.sample.choice
        offset = self._offsets[choice]
        self._offsets[choice] += len(token.text)
        return completion_logprobs([token], self._service.tokenizer, offset)
