"""What a served request took, and the figures of many, by the definitions of `vllm bench serve`.

TTFT  time to first token: first chunk with a choice - send
ITL   inter-token latency: the gaps between such chunks (a chunk may carry several tokens)
TPOT  time per output token: (E2EL - TTFT) / (output tokens - 1), of requests with more than one
E2EL  end-to-end latency: last chunk with a choice - send
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class RequestFigures:
    """One request, as its client saw it.

    Attributes:
        sent: clock when it was sent, in seconds.
        arrivals: clock of each chunk with a choice.
        prompt_tokens, output_tokens: as the server's `usage` says.
        error: why it failed, "" where it did not.
    """

    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds."""
        return self.arrivals[0] - self.sent

    @property
    def e2el(self) -> float:
        """Seconds."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds; None for one token or none."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        """Seconds, one fewer than chunks."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


def summarize(requests: Sequence[RequestFigures], seconds: float) -> dict[str, float]:
    """Figures of a run under the names that `vllm bench serve` saves them by.

    Args:
        seconds: of the whole run, from the first request sent to the last chunk, ramp-down included.
    """
    done = [request for request in requests if not request.error]
    prompt_tokens, output_tokens = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    figures: dict[str, float] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(requests) - len(done),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / seconds,
        "output_throughput": output_tokens / seconds,
        "total_token_throughput": (prompt_tokens + output_tokens) / seconds,
    }
    series = {
        "ttft": [r.ttft for r in done],
        "tpot": [r.tpot for r in done if r.tpot is not None],
        "itl": [gap for r in done for gap in r.itls],
        "e2el": [r.e2el for r in done],
    }
    for name, values in series.items():
        figures |= {f"{kind}_{name}_ms": value * 1000 for kind, value in spread(values).items()}
    return figures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile; zeros where there is no value."""
    array = np.asarray(values if len(values) else [0.0], np.float64)
    return {"mean": float(array.mean()), "median": float(np.median(array)), "p99": float(np.percentile(array, 99))}
