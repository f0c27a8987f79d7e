"""The model's tokenizer as the front end sees it."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.tokenizer.detokenizer import IncrementalDetokenizer, WindowDetokenizer
from jaxserve.tokenizer.token_bound import token_bound
from jaxserve.tokenizer.vocabulary import read_vocabulary

if TYPE_CHECKING:  # importing it takes seconds
    import tokenizers
    from transformers import PreTrainedTokenizerBase

MAX_RENDERED_CHARACTERS = 64 * 2**20
_TEMPLATE_ARGUMENTS = frozenset(
    {
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token of a text.

    Attributes:
        token_id: the token.
        text: the part of the input that it covers.
        start, stop: where, in bytes of the input's UTF-8.
    """

    token_id: int
    text: str
    start: int
    stop: int


class Tokenizer:
    """Text to token ids and back. Thread-safe.

    Args:
        inner: transformers' tokenizer; a fast one (with a `tokenizers` backend) is much faster and knows offsets.

    Attributes:
        bos_token_id, eos_token_id: None where there is none; the model's configuration may name more end-of-sequence tokens.
    """

    def __init__(self, inner: "PreTrainedTokenizerBase"):
        self._inner = inner
        self._backend = getattr(inner, "backend_tokenizer", None)
        self._vocabulary = None
        self._bound = None
        special = set(inner.all_special_ids)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._vocabulary = read_vocabulary(self._backend)
            self._bound = None if self._vocabulary is None else token_bound(self._backend, self._vocabulary)
            special = {token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = frozenset(special)
        self.bos_token_id: int | None = getattr(inner, "bos_token_id", None)
        self.eos_token_id: int | None = getattr(inner, "eos_token_id", None)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's own vocabulary may be larger."""
        return len(self._inner)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self._inner.chat_template)

    def chat_template(self, with_tools: bool = False) -> str:
        """The source of the chat template, "" where there is none; some models have one of their own for tools."""
        template = self._inner.chat_template
        if isinstance(template, dict):
            template = (template.get("tool_use") if with_tools else None) or template.get("default") or next(iter(template.values()), "")
        return template or ""

    def end_tokens(self) -> dict[str, int | None]:
        """The ids of the tokens that begin and end a text, by transformers' names."""
        return {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}

    def special_token_id(self, text: str) -> int | None:
        """The id of a special token; None where the text is none."""
        token_id = self._backend.token_to_id(text) if self._backend is not None else self._inner.get_vocab().get(text)
        return token_id if token_id in self._special_ids else None

    @property
    def pipeline(self) -> "tokenizers.Tokenizer | None":
        """What does the work, of the library `tokenizers`; None where the tokenizer is of another kind."""
        return self._backend

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least, told without tokenizing it; 0 where nothing is sure."""
        return 0 if self._bound is None else self._bound.least_tokens(text)

    def encode(self, text: str, add_special_tokens: bool = True, limit: int | None = None) -> list[int]:
        """Token ids of a text; other threads run meanwhile.

        Args:
            text: any text; special tokens written in it are recognized.
            add_special_tokens: add what the tokenizer adds around a text, such as BOS.
            limit: most tokens; a text that is sure to have more is not tokenized at all.

        Raises:
            InvalidRequest: the text has half a surrogate pair.
            ContextTooLong: it has more tokens than `limit`.
        """
        _check_unicode(text)
        if limit is not None and (least := self.least_tokens(text)) > limit:
            raise ContextTooLong(f"the prompt has at least {least} tokens, more than the {limit} allowed", "prompt")
        if self._backend is None:
            token_ids = self._inner.encode(text, add_special_tokens=add_special_tokens)
            _check_length(token_ids, limit)
            return token_ids
        # Of all the encode functions only those for batches release the GIL.
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        _check_length(encoding, limit)
        return encoding.ids

    def spans(self, text: str, add_special_tokens: bool = True) -> Iterator[TokenSpan]:
        """The tokens of a text with the bytes that each covers.

        Raises:
            InvalidRequest: as `encode`; or the model's tokenizer knows no offsets.
        """
        _check_unicode(text)
        if self._backend is None:
            raise InvalidRequest("the model's tokenizer does not tell where in the text a token is")
        encoding = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        return self._spans(text, encoding.ids, encoding.offsets)

    def _spans(self, text: str, token_ids: list[int], offsets: list[tuple[int, int]]) -> Iterator[TokenSpan]:
        character = byte = 0
        for token_id, (start, stop) in zip(token_ids, offsets, strict=True):
            if start < character:  # characters cut into several tokens begin again
                character, byte = 0, 0
            byte += len(text[character:start].encode())
            character = start
            covered = text[start:stop]
            yield TokenSpan(token_id, covered, byte, byte + len(covered.encode()))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids that the tokenizer does not have give no text."""
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        known = [token_id for token_id in token_ids if token_id < len(self._inner)]
        return str(self._inner.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    def is_special(self, token_id: int) -> bool:
        """Whether it is a special token: skipped where `skip_special_tokens` is set."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds to a text, possibly part of a character."""
        if self._vocabulary is not None:
            return self._vocabulary.token_bytes(token_id)
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """The text that a token adds, with U+FFFD for part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def detokenizer(self, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """An incremental detokenizer for one sample.

        Args:
            prompt_token_ids: the prompt, or its end: the output's first space depends on it.
            skip_special_tokens: special tokens give no text.
        """
        if self._vocabulary is not None:
            return self._vocabulary.detokenizer(prompt_token_ids, skip_special_tokens)
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens), prompt_token_ids)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        *,
        limit: int | None = None,
        **variables: Any,
    ) -> tuple[str, list[int]]:
        """Render a conversation as the model expects it, in a sandbox.

        Args:
            messages: at least one, each with a role.
            tools: JSON schemas of functions.
            add_generation_prompt: end with the start of an answer.
            continue_final_message: leave the last message open, for the model to go on with it.
            limit: most tokens, as in `encode`.
            variables: further variables of the template.

        Returns:
            The text and its token ids.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the conversation (with its own message).
            ContextTooLong: it has more tokens than `limit`.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "the model has no chat template; use /v1/completions, or give one with --tokenizer-config-path", "messages"
            )
        if not messages:
            raise InvalidRequest("`messages` must not be empty", "messages")
        if reserved := sorted(_TEMPLATE_ARGUMENTS & variables.keys()):
            raise InvalidRequest(f"`{reserved[0]}` is not a variable of the chat template", "chat_template_kwargs")
        try:
            text = self._inner.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"chat template: {error.message or type(error).__name__}", "messages") from error
        except Exception as error:  # a template may fail in any way over messages that it was not written for
            raise InvalidRequest(f"chat template: {error}", "messages") from error
        if not isinstance(text, str) or len(text) > MAX_RENDERED_CHARACTERS:
            raise InvalidRequest(f"chat template: the conversation is longer than {MAX_RENDERED_CHARACTERS} characters", "messages")
        return text, self.encode(text, add_special_tokens=False, limit=limit)


def _check_length(token_ids: Sized, limit: int | None) -> None:
    if limit is not None and len(token_ids) > limit:
        raise ContextTooLong(f"the prompt has {len(token_ids)} tokens, more than the {limit} allowed", "prompt")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
