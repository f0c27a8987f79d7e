"""From the tokens of one sample to the text that its client sees."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.request import FinishReason, SamplingParams
from jaxserve.tokenizer.stop import StopMatcher
from jaxserve.tokenizer.tokenizer import Tokenizer


@dataclass(slots=True)
class TextDelta:
    """What one push yields.

    Attributes:
        text: to be sent now; joined over all pushes, the sample's text.
        stop: the stop string that ended the sample; None while it goes on or if something else ended it.
        num_tokens: how many of the pushed tokens belong to the sample: those after a stop string do not.
        pieces: one text a token, special tokens included and nothing held back for stop strings (TGI's `token.text`), if asked for.
    """

    text: str
    stop: str | None = None
    num_tokens: int = 0
    pieces: list[str] = field(default_factory=list)


class TextStream:
    """Detokenizes, hides end tokens and stops at stop strings.

    Args:
        tokenizer: the model's.
        params: of the request.
        prompt_token_ids: what the output continues: whether it starts with a space depends on it.
        keep_pieces: fill TextDelta.pieces.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = (), keep_pieces: bool = False):
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(prompt_token_ids, params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._shows_end = params.include_stop_str_in_output
        self._unchecked = params.min_tokens
        self._keep_pieces = keep_pieces

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> TextDelta:
        """Take the tokens of one step.

        Args:
            token_ids: they may be none.
            finish_reason: why the engine ended the sample with them. The token that ended it (an end-of-sequence token or a stop
                token id) has no text, unless params.include_stop_str_in_output.
        """
        ends = finish_reason is FinishReason.EOS or finish_reason is FinishReason.STOP
        hidden = len(token_ids) - 1 if ends and not self._shows_end else -1
        if self._matcher is None and not self._keep_pieces:
            shown = token_ids[:-1] if hidden >= 0 else token_ids
            text = "".join([self._detokenizer.push(token_id) for token_id in shown])
            if finish_reason is not None:
                text += self._detokenizer.flush()
            return TextDelta(text, None, len(token_ids))
        delta = TextDelta("")
        for place, token_id in enumerate(token_ids):
            text = "" if place == hidden else self._detokenizer.push(token_id)
            delta.num_tokens += 1
            if self._keep_pieces:
                special = place == hidden or self._tokenizer.is_special(token_id)
                delta.pieces.append(self._tokenizer.token_text(token_id) if special else text)
            if self._take(delta, text):
                return delta
        if finish_reason is not None and not self._take(delta, self._detokenizer.flush()) and self._matcher is not None:
            delta.text += self._matcher.flush()
        return delta

    def _take(self, delta: TextDelta, text: str) -> bool:
        """Add text that passes the stop strings; whether one was matched."""
        if self._matcher is None or self._unchecked > 0:
            self._unchecked -= 1
            delta.text += text
            return False
        free, delta.stop = self._matcher.push(text)
        delta.text += free
        return delta.stop is not None
