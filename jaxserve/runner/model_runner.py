"""ModelRunner: the device half of the engine. Takes batches, gives back steps to collect."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.errors import DeviceError
from jaxserve.models import Model
from jaxserve.runner.batch import Batch, BatchLayout, BatchPacker
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.executor import Executor
from jaxserve.runner.hosts import Hosts
from jaxserve.runner.preparation import Preparation
from jaxserve.runner.programs import PAGE_COPIES, PAGE_ENTRIES, ProgramKey, num_scored_a_call
from jaxserve.runner.prompt_scores import pack_scored, unpack_scored
from jaxserve.runner.row_check import row_bits
from jaxserve.runner.sampler import unpack_sampled
from jaxserve.runner.sampling_state import needs_slot_load, slot_loads
from jaxserve.step import StepResult

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2


@dataclass(slots=True, eq=False)
class Step:
    """A step on the devices.

    Attributes:
        layout: of its bucket.
        num_rows: of the batch, without padding.
        wants_logprobs: whether any row asked for log probabilities.
        sampled: int32 [R, columns], once the sampler was dispatched.
        scored: the prompt's tokens of rows that want them, some a call.
        num_scored: how many of them, without padding.
    """

    layout: BatchLayout
    num_rows: int
    wants_logprobs: bool
    sampled: jax.Array | None = None
    scored: Sequence[jax.Array] = ()
    num_scored: int = 0


class ModelRunner:
    """Turns batches into calls of programs, and what they give into results. Owns the executor of one replica. Not thread-safe.

    At most two steps are in flight: dispatch step n+1, then collect step n.

    Args:
        model: loaded on the mesh.
        mesh: axes ("data", "tensor"); data is 1.
        config: sizes.
        preparation: of the same model, mesh and config, where one has begun before the weights were loaded.
        hosts: as for Executor.

    Raises:
        DeviceError: the KV cache does not fit.
    """

    def __init__(self, model: Model, mesh: Mesh, config: RunnerConfig, preparation: Preparation | None = None, hosts: Hosts | None = None):
        # For life
        self._config = config
        self._model_config = model.config
        platform = mesh.devices.flat[0].platform
        self._num_scored_a_call = num_scored_a_call(platform)
        self._results_are_copied = platform != "cpu"
        preparation = preparation or Preparation(model.architecture, model.dtype, mesh, config)
        self._buckets = preparation.buckets  # without those, from warmup() on, that give a token other bits
        self._executor = Executor(model, mesh, config, preparation, hosts)
        self._plan = self._executor.plan
        # From step to step
        self._packer = BatchPacker(config.max_batch_size, len(self._plan.num_pages), config.page_size)
        self._in_flight = 0
        self._unsampled: Step | None = None  # between forward() and sample()
        self._padded_tokens = 0
        self._useful_tokens = 0

    @property
    def kv_groups(self) -> list[tuple[int, int | None]]:
        """(number of pages, window) of each KV group."""
        return list(zip(self._plan.num_pages, self._plan.windows, strict=True))

    @property
    def buckets(self) -> Buckets:
        """The shapes of its steps."""
        return self._buckets

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Token counts that steps with prompts are compiled for, ascending; one between them is padded."""
        return self._buckets.step_sizes

    @property
    def max_scored_tokens(self) -> int:
        """As in Buckets."""
        return self._buckets.max_scored_tokens

    @property
    def logits(self) -> jax.Array:
        """Of the step between forward() and sample(), float32 [rows of the bucket's logits, V or wider], cut over shards: for checks."""
        return self._executor.logits

    @property
    def max_total_tokens(self) -> int:
        """Most tokens of a request."""
        return self._plan.max_total_tokens

    def warmup(self) -> None:
        """Compile every program that a legal request can hit and run each once, for nobody; from then on nothing is compiled."""
        begin = time.monotonic()
        self._executor.warmup()
        if self._config.deterministic:
            self._check_rows()
        logger.info("the programs were awaited and run for %.1f s", time.monotonic() - begin)

    def dispatch(self, batch: Batch) -> Step:
        """Start a step and its sampling; returns at once.

        Args:
            batch: its page copies are done and its new slots loaded first.
        """
        step, packed = self._prepare(batch)
        if step.layout.bucket not in self._buckets.whole or step.wants_logprobs or batch.num_scored:
            self._start_forward(step, batch, packed)
            self.sample(step)
            return step
        step.sampled = self._executor.run(ProgramKey("step", step.layout.bucket), packed)
        self._start_copy(step.sampled)
        return step

    def forward(self, batch: Batch) -> Step:
        """Start a step that waits for sample() after its logits; returns at once."""
        step, packed = self._prepare(batch)
        self._start_forward(step, batch, packed)
        return step

    def sample(self, step: Step, masks: np.ndarray | None = None) -> None:
        """Finish a step that forward() started; returns at once.

        Args:
            step: not sampled yet.
            masks: uint32 [rows of the batch, ceil(V / 32)], bit t % 32 of word t // 32 set where token t is allowed; None allows all.
                Needs RunnerConfig.masked.
        """
        assert step.sampled is None and step is self._unsampled, "sample() of a step that is not between forward() and sample()"
        num_rows = self._buckets.logit_rows(step.layout.bucket)
        if masks is not None:
            upload = np.full((num_rows, masks.shape[1]), 0xFFFFFFFF, np.uint32)
            upload[: len(masks)] = masks
            self._executor.run(ProgramKey("mask", num_rows), upload)
        kind = "logprobs" if step.wants_logprobs else "sample"
        step.sampled, self._unsampled = self._executor.run(ProgramKey(kind, num_rows)), None
        self._start_copy(step.sampled)

    def collect(self, step: Step) -> StepResult:
        """Wait for a step's tokens: one copy from the device."""
        assert step.sampled is not None, "collect() of a step that was not sampled"
        result = unpack_sampled(np.asarray(step.sampled))
        self._in_flight -= 1
        scored = unpack_scored([np.asarray(part) for part in step.scored], step.num_scored) if step.scored else None
        return StepResult(result.token_ids, result.counts, result.logprobs if step.wants_logprobs else None, scored)

    def stats(self) -> dict[str, int]:
        """The counters of EngineStats that the runner keeps."""
        return {
            "padded_tokens": self._padded_tokens,
            "useful_tokens": self._useful_tokens,
            "compile_events": self._executor.compile_events,
        }

    def close(self) -> None:
        """Stop counting compile events; the arrays go with the runner."""
        self._executor.close()

    def _check_rows(self) -> None:
        """Make sure that a token's bits depend neither on its place in a step nor on the step's size; sizes that change them are given up.

        Raises:
            DeviceError: they depend on the place in steps of the common size, whoever computes the products.
        """
        bits, common = self._row_bits(), self._config.common_tokens or self.step_sizes[-1]
        if not _agree(bits[common]):
            logger.warning("products depend on the place of a token: they are compiled again, by Triton alone")
            self._executor.recompile_products()
            bits = self._row_bits()
            if not _agree(bits[common]):
                raise DeviceError("--deterministic: on this device what a token gets depends on its place in a step")
        others = sorted(size for size in bits if not _agree(bits[size], bits[common]))
        if others:
            told = ", ".join(map(str, others))
            logger.warning("a token gets other bits in steps of %s tokens than in those of %d, which are computed instead", told, common)
            self._buckets = self._buckets.having(set(bits) - set(others))
        self._useful_tokens = self._padded_tokens = 0

    def _row_bits(self) -> dict[int, dict[int, set[bytes]]]:
        """By the tokens of a step, what `row_bits` found in steps of that size."""
        every, bits = self._buckets, dict[int, dict[int, set[bytes]]]()
        for bucket in every:
            self._buckets = every.having([bucket.num_tokens])
            sizes = dict(num_rows=bucket.num_rows, num_tokens=bucket.num_tokens, max_total_tokens=self.max_total_tokens)
            bits[bucket.num_tokens] = row_bits(self, page_size=self._config.page_size, num_pages=self._plan.num_pages, **sizes)
        self._buckets = every
        return bits

    def _prepare(self, batch: Batch) -> tuple[Step, np.ndarray]:
        """Bring the device state to where the step can run; returns the step, and what goes up for it."""
        assert self._in_flight < MAX_STEPS_IN_FLIGHT, "collect() a step first"
        layout = self._layout(self._buckets.pick(batch.num_tokens, len(batch.rows)))
        packed, entries, wants_logprobs = self._packer.pack(batch, layout)
        self._copy_pages(batch)
        self._load_slots(batch)
        self._add_page_entries(entries)
        self._in_flight += 1
        self._useful_tokens += batch.num_tokens
        self._padded_tokens += layout.bucket.num_tokens - batch.num_tokens
        return Step(layout, len(batch.rows), wants_logprobs), packed

    def _start_forward(self, step: Step, batch: Batch, packed: np.ndarray) -> None:
        self._executor.run(ProgramKey("forward", step.layout.bucket), packed)
        self._unsampled = step
        if batch.num_scored:
            self._start_scores(step, batch)

    def _start_scores(self, step: Step, batch: Batch) -> None:
        """Score the prompts' tokens that the step reached; before the next forward, which overwrites what they need."""
        assert step.layout.bucket.num_tokens <= self._buckets.max_scored_tokens, "a step that leaves no token's hidden state"
        uploads = pack_scored(batch, self._num_scored_a_call)
        step.scored = [scored for upload in uploads if (scored := self._executor.run(ProgramKey("score"), upload)) is not None]
        step.num_scored = batch.num_scored
        for part in step.scored:
            self._start_copy(part)

    def _start_copy(self, result: jax.Array | None) -> None:
        """Start to bring to the host what collect() will read.

        A CPU's results lie where collect() reads them. To start a copy of one all the same makes its program call back into Python when it
        has run, after collect() went on: where the process ends just then, it dies of SIGABRT (jaxlib 0.11.2).
        """
        assert result is not None, "a program without a result"
        if self._results_are_copied:
            result.copy_to_host_async()

    def _copy_pages(self, batch: Batch) -> None:
        for begin in range(0, len(batch.page_copies), PAGE_COPIES):
            pages = np.zeros((len(self._plan.num_pages), 2, PAGE_COPIES), np.int32)
            pages[:, 1] = np.array(self._plan.num_pages)[:, None]
            for i, (group, source, target) in enumerate(batch.page_copies[begin : begin + PAGE_COPIES]):
                pages[group, :, i] = source, target
            self._executor.run(ProgramKey("copy_pages"), pages)

    def _load_slots(self, batch: Batch) -> None:
        for row in batch.rows:
            sample = row.sample
            if row.new_slot and needs_slot_load(sample.params):
                prompt = sample.request.prompt_token_ids
                config = self._model_config
                outputs = sample.token_ids[len(prompt) :]
                for load in slot_loads(sample.slot, sample.params, prompt, outputs, config.eos_token_ids, config.vocab_size):
                    self._executor.run(ProgramKey("load_slot"), load)

    def _add_page_entries(self, entries: np.ndarray) -> None:
        for begin in range(0, len(entries), PAGE_ENTRIES):
            upload = np.full((PAGE_ENTRIES, entries.shape[1]), self._config.max_batch_size, np.int32)
            upload[: len(entries) - begin] = entries[begin : begin + PAGE_ENTRIES]
            self._executor.run(ProgramKey("add_page_entries"), upload)

    def _layout(self, bucket: Bucket) -> BatchLayout:
        return BatchLayout.of(bucket, len(self._plan.num_pages), self._config.page_size)


def _agree(*bits: dict[int, set[bytes]]) -> bool:
    """Whether each prompt has the same bits in all that was found."""
    return all(len(set().union(*(found.get(number, ()) for found in bits))) == 1 for number in bits[0])
