"""Fields that chat and text completions and the lines of batch files share."""

from collections.abc import Mapping

from pydantic import Field

from jaxserve.errors import InvalidRequest
from jaxserve.http.body import Body
from jaxserve.http.grammar_fields import GrammarFields
from jaxserve.http.sampler_fields import Ignored
from jaxserve.request import SamplingParams


class StreamOptions(Body):
    """OpenAI's stream_options, and vLLM's continuous_usage_stats."""

    include_usage: bool | None = Field(None, description="The stream ends with an event that tells the usage.")
    continuous_usage_stats: bool | None = Field(None, description="With include_usage: every event tells the usage so far.")
    include_obfuscation: Ignored = None


class SamplingFields(GrammarFields):
    """Fields that chat and completions share."""

    n: int | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None
    # vLLM's
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Keep this many tokens of the prompt's end; -1: as many as are allowed."
    )
    prompt_logprobs: int | None = Field(None, description="Tell the log probabilities of the prompt, and so many tokens beside each.")
    return_token_ids: bool | None = Field(None, description="Tell the token ids of prompt and output too.")
    return_tokens_as_token_ids: bool | None = Field(None, description='Tokens in logprobs are "token_id:ID".')

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage event."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream tells the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_stream_options(self) -> None:
        """Raise InvalidRequest for stream options without a stream, and for what cannot be streamed."""
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("`prompt_logprobs` cannot be streamed", "prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` is only allowed with `stream`", "stream_options")

    def sampling_params(self, defaults: Mapping[str, float], max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """What is asked for; not yet validated.

        Args:
            defaults: of the model's generation_config.json, for absent fields.
            max_tokens, logprobs: they differ between chat and completions.
        """
        n = 1 if self.n is None else self.n
        return self.sampler_params(defaults, max_tokens, logprobs, self.grammar(), n, self.prompt_logprobs)

    def truncated(self, token_ids: list[int], most: int) -> list[int]:
        """The end of a prompt, as `truncate_prompt_tokens` asks for it.

        Args:
            most: prompt tokens that are allowed.

        Raises:
            InvalidRequest: it asks for more than that.
        """
        kept = self.truncate_prompt_tokens
        if kept is None:
            return token_ids
        if kept > most:
            raise InvalidRequest(f"`truncate_prompt_tokens` must be <= {most}. Given: {kept}", "truncate_prompt_tokens")
        return token_ids[-(most if kept == -1 else kept) :] if kept else []


def check_logprobs(name: str, value: int, most: int) -> int:
    """The value, or InvalidRequest where it is out of bounds."""
    if not 0 <= value <= most:
        raise InvalidRequest(f"`{name}` must be >= 0 and <= {most}. Given: {value}", name)
    return value
