"""The README's table of figures, made from `benchmarks/results/*.json`.

    python -m benchmarks.table

writes it between the two marks in README.md; a test holds that it is what the results say. vLLM's figures are of version 0.24.0 on the
same kind of GPU with the same shapes and prompts (torch 2.11, CUDA 13), measured once by hand; no command of this repository makes them.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: python -m benchmarks.table -->", "<!-- end of figures -->"

# What a reader wants to know: title, name of the row, vLLM's figure.
FIGURES: tuple[tuple[str, str, float | None], ...] = (
    ("8B, decode step of 1 request", "decode_step_b1_ms", 5.00),
    ("8B, decode step of 64 requests", "decode_step_b64_ms", 7.98),
    ("8B, decode step of 256 requests", "decode_step_b256_ms", 18.76),
    ("8B, prefill of 64 prompts of 2048 tokens", "prefill_64x2048_tok_s", 42_600),
    ("8B, prefill of 8 prompts of 8192 tokens", "prefill_8x8192_tok_s", 38_400),
    ("8B over HTTP, 1 client: output", "http_c1_tok_s", 197.6),
    ("8B over HTTP, 1 client: first token", "http_c1_ttft_ms", 31.4),
    ("8B over HTTP, 16 clients: output", "http_c16_tok_s", 2_276),
    ("8B over HTTP, 64 clients: output", "http_c64_tok_s", 4_665),
    ("8B over HTTP, 256 clients: output", "http_c256_tok_s", 5_998),
    ("8B, start to ready, nothing compiled before", "ready_cold_s", 80.5),
    ("8B, start to ready, second start", "ready_warm_s", None),
    ("1B, decode step of 1 request", "decode_step_1b_b1_ms", 1.34),
    ("1B, decode step of 64 requests", "decode_step_1b_b64_ms", 2.28),
    ("1B, decode step of 256 requests", "decode_step_1b_b256_ms", 5.00),
    ("8B in fp8, decode step of 1 request", "fp8_decode_step_b1_ms", 3.50),
    ("8B in fp8, decode step of 64 requests", "fp8_decode_step_b64_ms", 6.26),
    ("8B in fp8, decode step of 256 requests", "fp8_decode_step_b256_ms", 16.14),
    ("8B in fp8, prefill of 8 prompts of 8192 tokens", "fp8_prefill_8x8192_tok_s", 57_000),
    ("8B in fp8 with an fp8 cache, 1000 tokens in, 1000 out: output", "fp8_1000_1000_tok_s", None),
    ("8B in 4 bits, decode step of 1 request", "w4_decode_step_b1_ms", None),
    ("8B in 4 bits, decode step of 64 requests", "w4_decode_step_b64_ms", None),
    ("8B in 4 bits, decode step of 256 requests", "w4_decode_step_b256_ms", None),
    ("longest gap of a stream beside prompts of 8192 tokens, --max-decode-gap-ms 60", "decode_gap_bound_60_ms", None),
    ("decode attention, 64 requests of 4k tokens", "decode_attention_b64_4k_tbps", None),
)


def render(rows: list[dict]) -> str:
    """The table of the rows that are there, as Markdown."""
    by_name = {row["name"]: row for row in rows}
    shown = [(title, by_name[name], rival) for title, name, rival in FIGURES if name in by_name]
    builds = sorted({f"{row['device']}, jax {row['jax']}, commit {row['commit']}, {row['date']}" for _, row, _ in shown})
    lines = ["| Llama-3.1-8B and Llama-3.2-1B shapes, bfloat16 where nothing is said | jaxserve | vLLM 0.24.0 |", "|---|---|---|"]
    for title, row, rival in shown:
        lines.append(f"| {title} | {_figure(row['value'])} {row['unit']} | {'' if rival is None else f'{_figure(rival)} {row["unit"]}'} |")
    return "\n".join([*lines, "", f"Measured on: {'; '.join(builds)}."])


def rows() -> list[dict]:
    """All rows of all results."""
    return [row for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())]


def put(readme: str, table: str) -> str:
    """The README with this table between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(put(path.read_text(), render(rows())))
