"""Turn: the answers to a conversation, token by token, taken apart into reasoning, content and tool calls."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.chat_output import MessageDelta, MessageParser
from jaxserve.http.answer import Answers, Sample, SampleResult, SampleToken
from jaxserve.http.conversation import AnswerFormat
from jaxserve.request import FinishReason

_PLAIN_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


@dataclass(slots=True)
class ToolCall:
    """A whole tool call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """A whole answer."""

    sample: Sample
    finish_reason: str | None
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tokens: Sequence[SampleToken] = ()


class Turn:
    """The answers of one HTTP request about one conversation.

    Args:
        answers: to be read.
        answer_format: how.

    Attributes:
        prompt: the rendered text.
        num_reasoning_tokens: output tokens so far that were reasoning, of all samples.
    """

    def __init__(self, answers: Answers, answer_format: AnswerFormat, prompt: str = ""):
        self.answers = answers
        self.prompt = prompt
        self.num_reasoning_tokens = 0
        self.has_reasoning = bool(answer_format.reasoning)
        self.plain = answer_format.plain
        self._parsers: list[MessageParser] = [answer_format.new_parser() for _ in answers.samples]

    async def read(self) -> list[tuple[SampleToken, MessageDelta]]:
        """Wait for new tokens and what each adds to its sample's message; none at the end. Raises as Answers.read()."""
        return [(token, self._delta(token)) for token in await self.answers.read()]

    async def collect(self) -> list[Message]:
        """Wait for the end of all samples. Raises as Answers.collect()."""
        return [self._message(result) for result in await self.answers.collect()]

    def finish_reason(self, sample: Sample) -> str | None:
        """OpenAI's name for why a sample ended."""
        if sample.finish_reason in (FinishReason.EOS, FinishReason.STOP) and self._parsers[sample.choice].num_calls:
            return "tool_calls"
        return plain_finish_reason(sample)

    def _delta(self, token: SampleToken) -> MessageDelta:
        parser = self._parsers[token.sample.choice]
        delta = parser.push(token.text, last=token.finish_reason is not None)
        self.num_reasoning_tokens += bool(delta.reasoning) or parser.in_reasoning
        return delta

    def _message(self, result: SampleResult) -> Message:
        message = Message(result.sample, None, tokens=result.tokens)
        deltas = [self._delta(token) for token in result.tokens]
        message.content = "".join([delta.content for delta in deltas])
        message.reasoning = "".join([delta.reasoning for delta in deltas])
        arguments: list[list[str]] = []
        for call in (call for delta in deltas for call in delta.tool_calls):
            if call.name is not None and call.id is not None:
                message.tool_calls.append(ToolCall(call.id, call.name))
                arguments.append([])
            arguments[call.index].append(call.arguments)
        for call, pieces in zip(message.tool_calls, arguments, strict=True):
            call.arguments = "".join(pieces)
        message.finish_reason = self.finish_reason(result.sample)
        return message


def plain_finish_reason(sample: Sample) -> str | None:
    """OpenAI's name for why a sample without tool calls ended."""
    return _PLAIN_REASONS[sample.finish_reason] if sample.finish_reason is not None else None
