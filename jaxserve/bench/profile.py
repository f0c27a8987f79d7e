"""`bench --profile`: a trace of some steady steps, and which kernels and gaps they consist of."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jax import profiler

from jaxserve.errors import StartupError
from jaxserve.llm import LLM
from jaxserve.request import Request, SamplingParams

NUM_STEPS = 20
SETTLED = 0.25  # share of all output tokens after which the mix of a step is taken as steady
KERNELS_SHOWN, GAPS_SHOWN, NAME_WIDTH = 16, 8, 90
# Lines of a CPU's trace hold the bookkeeping of XLA's threads beside its operations.
_CPU_THREADS, _NO_KERNELS = "tf_XLA", ("ThreadpoolListener", "ThunkExecutor", "end: ")


@dataclass(frozen=True, slots=True, order=True)
class Kernel:
    """Something that ran on a device, in nanoseconds."""

    start: float
    duration: float
    name: str


def profile(llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], folder: str) -> list[str]:
    """Run requests up to its steady steps, and trace some of those; the rest is aborted.

    Args:
        folder: where the trace goes, for TensorBoard or Perfetto.

    Returns:
        lines of a table (`describe`).

    Raises:
        StartupError: the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"cannot write {folder}: {error.strerror}") from None
    engine = llm.engines[0]
    requests = [Request(f"profile-{i}", tuple(prompt), p) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]
    for request in requests:
        engine.add_request(request)
    wanted = SETTLED * sum(request.params.max_tokens or 1 for request in requests)
    while wanted > 0 and engine.has_work:
        wanted -= sum(len(output.token_ids) for output in engine.step())
    options = profiler.ProfileOptions()
    options.python_tracer_level = 0  # it costs more than a step
    before = engine.stats().num_steps
    with profiler.trace(folder, profiler_options=options):
        for _ in range(NUM_STEPS):
            engine.step()
        engine.close()  # what is in flight belongs to the last step
    num_steps = engine.stats().num_steps - before
    for request in requests:
        engine.abort(request.request_id)
    while engine.has_work:
        engine.step()
    name, kernels = read_trace(Path(folder))
    return describe(name, kernels, num_steps)


def read_trace(folder: Path) -> tuple[str, list[Kernel]]:
    """The first device of the newest trace in a folder, and what ran there; a CPU where there is no GPU."""
    newest = max(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = {plane.name: list(plane.lines) for plane in profiler.ProfileData.from_file(str(newest)).planes}
    gpus = sorted(name for name in planes if name.startswith("/device:GPU"))
    name = gpus[0] if gpus else "/host:CPU"
    lines = [line for line in planes[name] if line.name.startswith("Stream" if gpus else _CPU_THREADS)]
    events = (event for line in lines for event in line.events)
    return name, [Kernel(e.start_ns, e.duration_ns, e.name) for e in events if not e.name.startswith(_NO_KERNELS)]


def describe(device: str, kernels: Iterable[Kernel], num_steps: int) -> list[str]:
    """The heaviest kernels, and the longest times in which nothing ran, by the kernels before and after; both added up over the steps."""
    ordered = sorted(kernels)
    if not ordered or not num_steps:
        return ["profile: nothing ran"]
    ran: dict[str, list[float]] = defaultdict(list)
    idle: dict[str, list[float]] = defaultdict(list)
    for kernel in ordered:
        ran[kernel.name].append(kernel.duration)
    last = ordered[0]  # the kernel that ends last of those so far
    for before, kernel in pairwise(ordered):
        last = max(last, before, key=lambda k: k.start + k.duration)
        if (gap := kernel.start - last.start - last.duration) > 0:
            half = NAME_WIDTH // 2 - 2
            idle[f"{last.name[:half]} -> {kernel.name[:half]}"].append(gap)
    span = max(k.start + k.duration for k in ordered) - ordered[0].start
    idle_time = sum(map(sum, idle.values()))
    told = f"profile: {num_steps} steps on {device}, {span / num_steps / 1e6:.3f} ms a step, idle {idle_time / span:.1%}"
    kernels_table = _table("kernel", ran, num_steps, KERNELS_SHOWN)
    return [told, *kernels_table, *_table("nothing ran between", idle, num_steps, GAPS_SHOWN)]


def _table(title: str, durations: dict[str, list[float]], num_steps: int, most: int) -> list[str]:
    heaviest = sorted(durations.items(), key=lambda item: -sum(item[1]))[:most]
    lines = [
        f"  {sum(each) / num_steps / 1e3:12,.1f} {len(each) / num_steps:9,.2f}  {name[:NAME_WIDTH].splitlines()[0]}"
        for name, each in heaviest
    ]
    return [f"  {'us a step':>12} {'x a step':>9}  {title}", *lines]
