"""Settings of a batch run."""

from dataclasses import dataclass

from jaxserve.batch.lines import FORMATS
from jaxserve.config import option


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Where prompts come from, where answers go, and how to sample where a line does not say."""

    input: str = option("-", "File of prompts, one a line; - is standard input.", metavar="FILE")
    output: str = option(
        "-", "File of answers in JSON lines, continued where an earlier run stopped; - is standard output.", metavar="FILE"
    )
    input_format: str = option("auto", "What a line is; auto: by the file's name, else by the first line.", FORMATS)
    max_tokens: int | None = option(None, "Most output tokens. Default: 256; of an OpenAI line, the route's.", low=1)
    temperature: float | None = option(None, "0 is greedy. Default: the model's.", low=0)
    top_p: float | None = option(None, "Keep the most likely tokens of this probability mass. Default: the model's.", low=0, high=1)
    top_k: int | None = option(None, "Keep the k most likely tokens. Default: the model's.", low=0)
    seed: int | None = option(None, "Same seed, same tokens.")
    stop: tuple[str, ...] = option((), "A string that ends an answer; may be repeated.")
    ignore_eos: bool = option(False, "Go on behind the model's end-of-sequence token.")

    @property
    def sampling(self) -> dict[str, object]:
        """The sampling fields that were given, as a line would hold them."""
        given = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")}
        given |= {"stop": list(self.stop) or None, "ignore_eos": self.ignore_eos or None}
        return {name: value for name, value in given.items() if value is not None}
