"""Answers streamed as OpenAI's chunks, one event a token.

An event is put together from strings that are ready but for the token's text: every token costs one, and nothing in the http process is
done more often. Answers that are taken apart (tool calls, reasoning) are turn_events.py's.
"""

from collections.abc import Sequence
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.http.answer import Answers, Sample, SampleToken
from jaxserve.http.errors import error_event, failure_kind
from jaxserve.http.logprobs import chat_logprobs, completion_logprobs, prompt_logprob_columns, whole_logprobs
from jaxserve.http.openai_rendering import answer_of, token_ids, usage
from jaxserve.http.sampling_fields import SamplingFields
from jaxserve.http.service import Service
from jaxserve.http.sse import DONE, compact, quoted
from jaxserve.http.turn import plain_finish_reason

USAGE_LATER = ',"usage":null'


class ChatEvents:
    """Chunks of /v1/chat/completions (see sse.Events): each choice begins with its role.

    Args:
        service: tokenizer and metrics.
        answers: to be read.
        head: what each chunk begins with.
        body: of the request; it says what is told beside the text.
        echoes: what goes before each choice's text.
    """

    kind = "chat.completion.chunk"

    def __init__(self, service: Service, answers: Answers, head: dict[str, Any], body: SamplingFields, echoes: Sequence[str]):
        self._service = service
        self._answers = answers
        self._echoes = echoes
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        self._tells_ids = bool(body.return_token_ids)
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._bare = not self._continuous_usage and not self._tells_ids
        self._head = "data: " + compact({**head, "object": self.kind})[:-1]
        if body.include_usage and not body.continuous_usage:
            self._head += USAGE_LATER
        choices = [sample.choice for sample in answers.samples]
        self._opening = [self._head + self._choice_opening(choice) for choice in choices]
        self._closing = self._choice_closing("null", "null")
        self._unopened = set(choices)
        self._num_told = 0
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
                self._unopened.remove(choice)
                parts += self._first_events(choice)
            self._num_told += token.token_id >= 0
            plain = self._bare and token.logprobs is None and token.finish_reason is None
            parts += (opening[choice], quoted(token.text), closing if plain else self._token_closing(token))
        return "".join(parts).encode()

    def failed(self, error: JaxserveError) -> bytes:
        self._service.metrics.tgi_failure.labels(failure_kind(error)).inc()
        return (error_event("/v1/", error) + DONE).encode()

    def abort(self) -> None:
        self._answers.abort()

    def _choice_opening(self, choice: int) -> str:
        return f',"choices":[{{"index":{choice},"delta":{{"content":'

    def _choice_closing(self, logprobs: str, reason: str, more: str = "", behind: str = "") -> str:
        """The end of an event: `more` of the choice, and what stands `behind` the choices."""
        return f'}},"logprobs":{logprobs},"finish_reason":{reason}{more}}}]{behind}}}\n\n'

    def _first_events(self, choice: int) -> list[str]:
        delta = '{"role":"assistant","content":""}'
        ids = f',"prompt_token_ids":{compact(list(answer_of(self._answers, choice).request.prompt_token_ids))}' if self._tells_ids else ""
        events = [
            f'{self._head},"choices":[{{"index":{choice},"delta":{delta},"logprobs":null,"finish_reason":null}}]{ids}{self._usage_now()}}}\n\n'
        ]
        if self._echoes[choice]:
            closing = self._choice_closing("null", "null", behind=self._usage_now())
            events.append(f"{self._head}{self._choice_opening(choice)}{quoted(self._echoes[choice])}{closing}")
        return events

    def _token_closing(self, token: SampleToken) -> str:
        logprobs = None if token.logprobs is None else self._logprobs(token)
        reason = None if token.finish_reason is None else self._finish_reason(token.sample)
        ids = f',"token_ids":{compact(token_ids([token]))}' if self._tells_ids else ""
        return self._choice_closing(compact(logprobs), compact(reason), ids, self._usage_now())

    def _finish_reason(self, sample: Sample) -> str | None:
        return plain_finish_reason(sample)

    def _logprobs(self, token: SampleToken) -> dict[str, Any]:
        return chat_logprobs([token], self._service.tokenizer, self._as_ids)

    def _usage(self, num_told: int | None = None) -> dict[str, Any]:
        return usage(self._answers, num_told=num_told)

    def _usage_now(self) -> str:
        return f',"usage":{compact(self._usage(self._num_told))}' if self._continuous_usage else ""

    def _last_events(self) -> str:
        if not self._include_usage:
            return DONE
        head = self._head.removesuffix(USAGE_LATER)
        return f'{head},"choices":[],"usage":{compact(self._usage())}}}\n\n{DONE}'


class CompletionEvents(ChatEvents):
    """Chunks of /v1/completions: each choice begins with its echo, where asked for."""

    kind = "text_completion"

    def __init__(self, service: Service, answers: Answers, head: dict[str, Any], body: SamplingFields, echoes: Sequence[str]):
        self._offsets = [len(echo) for echo in echoes]
        super().__init__(service, answers, head, body, echoes)

    def _choice_opening(self, choice: int) -> str:
        return f',"choices":[{{"index":{choice},"text":'

    def _choice_closing(self, logprobs: str, reason: str, more: str = "", behind: str = "") -> str:
        return f',"logprobs":{logprobs},"finish_reason":{reason}{more}}}]{behind}}}\n\n'

    def _first_events(self, choice: int) -> list[str]:
        if not self._echoes[choice] and not self._tells_ids:
            return []
        ids = (
            f',"prompt_token_ids":{compact(list(answer_of(self._answers, choice).request.prompt_token_ids))},"token_ids":[]'
            if self._tells_ids
            else ""
        )
        answer = answer_of(self._answers, choice)
        logprobs = "null"
        if self._echoes[choice] and answer.request.params.logprobs is not None:
            columns = prompt_logprob_columns(answer.request.prompt_token_ids, answer.prompt_logprobs, self._service.tokenizer, self._as_ids)
            logprobs = compact(whole_logprobs(columns))
        closing = self._choice_closing(logprobs, "null", ids, self._usage_now())
        return [self._head + self._choice_opening(choice) + quoted(self._echoes[choice]) + closing]

    def _logprobs(self, token: SampleToken) -> dict[str, Any]:
        choice = token.sample.choice
        offset = self._offsets[choice]
        self._offsets[choice] += len(token.text)
        return whole_logprobs(completion_logprobs([token], self._service.tokenizer, offset, self._as_ids))
