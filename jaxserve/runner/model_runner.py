"""ModelRunner: the device half of the engine. Takes batches, gives back steps to collect."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from jaxserve.errors import DeviceError
from jaxserve.models import Model
from jaxserve.runner.batch import Batch, BatchLayout, BatchPacker
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.compile import CompileEvents
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.preparation import Preparation
from jaxserve.runner.programs import (
    PAGE_COPIES,
    PAGE_ENTRIES,
    TRITON_PRODUCTS,
    ProgramKey,
    SamplerForm,
    logprob_forms,
    mask_words,
    num_scored_a_call,
)
from jaxserve.runner.prompt_scores import pack_scored, unpack_scored
from jaxserve.runner.row_check import rows_agree
from jaxserve.runner.sampler import unpack_sampled
from jaxserve.runner.sampling_rows import neutral_columns
from jaxserve.runner.sampling_state import needs_slot_load, slot_loads
from jaxserve.runner.state import allocate_state
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
        packed: what went up.
        logits: float32 [R, V] and the sampler's columns, between forward() and sample().
        sampled: int32 [R, columns], once the sampler was dispatched.
        scored: the prompt's tokens of rows that want them, some a call.
        num_scored: how many of them, without padding.
    """

    layout: BatchLayout
    num_rows: int
    wants_logprobs: bool
    packed: jax.Array
    logits: list[jax.Array] | None = None
    sampled: jax.Array | None = None
    scored: Sequence[jax.Array] = ()
    num_scored: int = 0


class ModelRunner:
    """Owns weights, KV cache and programs of one replica. Not thread-safe.

    At most two steps are in flight: dispatch step n+1, then collect step n.

    Args:
        model: loaded on the mesh.
        mesh: axes ("data", "tensor"); data is 1.
        config: sizes.
        preparation: of the same model, mesh and config, where one has begun before the weights were loaded.

    Raises:
        DeviceError: the KV cache does not fit.
    """

    def __init__(self, model: Model, mesh: Mesh, config: RunnerConfig, preparation: Preparation | None = None):
        # For life
        self._config = config
        self._model = model
        self._mesh = mesh
        platform = mesh.devices.flat[0].platform
        self._buckets = Buckets.for_platform(platform, config.max_batch_size, config.max_batch_tokens, config.deterministic)
        self._logprob_forms, self._num_scored_a_call = logprob_forms(platform), num_scored_a_call(platform)
        self._hidden = jax.ShapeDtypeStruct((config.max_batch_tokens, model.config.hidden_size), model.dtype)
        self._preparation = preparation or Preparation(model.architecture, model.dtype, mesh, config)
        self._plan = self._preparation.plan()
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._compiled: dict[ProgramKey, Compiled] = {}
        self._compile_events = CompileEvents()
        # The masks of a step without constrained rows, where it takes the masked sampler nevertheless.
        self._nothing_masked: jax.Array | None = None
        if config.deterministic and config.masked:
            words = mask_words(model.config.vocab_size)
            self._nothing_masked = self._upload(np.full((self._buckets.logits[-1], words), 0xFFFFFFFF, np.uint32))
        # From step to step
        self._packer = BatchPacker(config.max_batch_size, len(self._plan.num_pages), config.page_size)
        self._in_flight = 0
        self._padded_tokens = 0
        self._useful_tokens = 0

    @property
    def kv_groups(self) -> list[tuple[int, int | None]]:
        """(number of pages, window) of each KV group."""
        return list(zip(self._plan.num_pages, self._plan.windows, strict=True))

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Token counts that steps with prompts are compiled for, ascending; one between them is padded."""
        return self._buckets.step_sizes

    @property
    def max_total_tokens(self) -> int:
        """Most tokens of a request."""
        return self._plan.max_total_tokens

    def warmup(self) -> None:
        """Compile every program that a legal request can hit and run each once, for nobody; from then on nothing is compiled."""
        begin = time.monotonic()
        self._compiled = self._preparation.finish()
        compiled = time.monotonic()
        # Not before: XLA tries out variants of products as it compiles, and wants memory for their operands.
        num_slots, vocab_size = self._config.max_batch_size, self._model.config.vocab_size
        self._state = allocate_state(self._plan, num_slots, vocab_size, self._hidden, self._mesh)
        self._run_for_nobody()
        if self._config.deterministic:
            self._check_rows()
        self._compile_events.start()
        logger.info(
            "%d programs: waited %.1f s for them, ran them in %.1f s", len(self._compiled), compiled - begin, time.monotonic() - compiled
        )

    def dispatch(self, batch: Batch) -> Step:
        """Start a step and its sampling; returns at once.

        Args:
            batch: its page copies are done and its new slots loaded first.
        """
        step = self.forward(batch)
        self.sample(step)
        return step

    def forward(self, batch: Batch) -> Step:
        """Start a step that waits for sample() after its logits; returns at once."""
        step = self._prepare(batch)
        self._start_forward(step)
        if batch.num_scored:
            self._start_scores(step, batch)
        return step

    def sample(self, step: Step, masks: np.ndarray | None = None) -> None:
        """Finish a step that forward() started; returns at once.

        Args:
            step: not sampled yet.
            masks: uint32 [rows of the batch, ceil(V / 32)], bit t % 32 of word t // 32 set where token t is allowed; None allows all.
                Needs RunnerConfig.masked.
        """
        assert step.logits is not None, "sample() of a step that is not between forward() and sample()"
        logits, columns = step.logits
        masked = masks is not None or self._nothing_masked is not None
        form = SamplerForm(self._buckets.logit_rows(step.layout.bucket), masked, step.wants_logprobs or False not in self._logprob_forms)
        arguments = [logits, self._state.sampling, columns]
        if masks is not None:
            padded = np.full((form.num_rows, masks.shape[1]), 0xFFFFFFFF, np.uint32)
            padded[: len(masks)] = masks
            arguments.append(self._upload(padded))
        elif self._nothing_masked is not None:
            arguments.append(self._nothing_masked)
        sampling, sampled = self._compiled[ProgramKey("sample", form)](*arguments)
        self._state = replace(self._state, sampling=sampling)
        sampled.copy_to_host_async()
        step.logits, step.sampled = None, sampled

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
            "compile_events": self._compile_events.count,
        }

    def close(self) -> None:
        """Stop counting compile events; the arrays go with the runner."""
        self._compile_events.stop()

    def _run_for_nobody(self) -> None:
        """Run what the first requests would otherwise be the first to run. A GPU records a program's CUDA graph in its second run."""
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"
        for bucket in [next(iter(self._buckets))] if on_cpu else [*self._buckets] * 2:
            layout = self._layout(bucket)
            step = Step(layout, 0, False, self._upload(self._packer.padding(layout)))
            self._in_flight += 1
            self._start_forward(step)
            self.sample(step)
            self.collect(step)
        for _ in range(1 if on_cpu else 2):
            self._sample_for_nobody()
            scored = np.zeros((2, self._num_scored_a_call), np.int32)
            self._compiled[ProgramKey("score")](self._model.leaves, self._state.hidden, self._upload(scored)).block_until_ready()

    def _check_rows(self) -> None:
        """Make sure that a token's bits do not depend on its place in a step.

        Raises:
            DeviceError: they do on this device, whoever computes the products.
        """
        sizes = dict(num_slots=self._config.max_batch_size, num_tokens=self._config.max_batch_tokens)
        check = partial(rows_agree, self, page_size=self._config.page_size, num_pages=self._plan.num_pages, **sizes)
        if not check():
            logger.warning("products depend on the place of a token: they are compiled again, by Triton alone")
            for key in self._compiled:
                if key.kind in ("forward", "score"):
                    self._compiled[key] = self._preparation.compile_again(key, TRITON_PRODUCTS)
            self._run_for_nobody()
            if not check():
                raise DeviceError("--deterministic: on this device what a token gets depends on its place in a step")
        self._useful_tokens = self._padded_tokens = 0

    def _sample_for_nobody(self) -> None:
        """Run every form of the sampler on rows that do not sample."""
        vocab_size, sampled = self._model.config.vocab_size, None
        for form in (key.shape for key in self._compiled if isinstance(key.shape, SamplerForm)):
            arrays = [np.zeros((form.num_rows, vocab_size), np.float32), np.tile(neutral_columns(), (form.num_rows, 1))]
            arrays += [np.full((form.num_rows, mask_words(vocab_size)), 0xFFFFFFFF, np.uint32)] if form.masked else []
            logits, columns, *masks = map(self._upload, arrays)
            sampling, sampled = self._compiled[ProgramKey("sample", form)](logits, self._state.sampling, columns, *masks)
            self._state = replace(self._state, sampling=sampling)
        jax.block_until_ready(sampled)

    def _prepare(self, batch: Batch) -> Step:
        """Bring the device state to where the step can run, and upload the step."""
        assert self._in_flight < MAX_STEPS_IN_FLIGHT, "collect() a step first"
        layout = self._layout(self._buckets.pick(batch.num_tokens, len(batch.rows)))
        packed, entries, wants_logprobs = self._packer.pack(batch, layout)
        self._copy_pages(batch)
        self._load_slots(batch)
        self._add_page_entries(entries)
        self._in_flight += 1
        self._useful_tokens += batch.num_tokens
        self._padded_tokens += layout.bucket.num_tokens - batch.num_tokens
        return Step(layout, len(batch.rows), wants_logprobs, self._upload(packed))

    def _start_forward(self, step: Step) -> None:
        run = self._compiled[ProgramKey("forward", step.layout.bucket)]
        self._state, *step.logits = run(self._model.leaves, self._state, step.packed)

    def _start_scores(self, step: Step, batch: Batch) -> None:
        """Score the prompts' tokens that the step reached; before the next forward, which overwrites what they need."""
        run, size = self._compiled[ProgramKey("score")], self._num_scored_a_call
        uploads = pack_scored(batch, size)
        step.scored = [run(self._model.leaves, self._state.hidden, self._upload(upload)) for upload in uploads]
        step.num_scored = batch.num_scored
        for part in step.scored:
            part.copy_to_host_async()

    def _copy_pages(self, batch: Batch) -> None:
        for begin in range(0, len(batch.page_copies), PAGE_COPIES):
            pages = np.zeros((len(self._plan.num_pages), 2, PAGE_COPIES), np.int32)
            pages[:, 1] = np.array(self._plan.num_pages)[:, None]
            for i, (group, source, target) in enumerate(batch.page_copies[begin : begin + PAGE_COPIES]):
                pages[group, :, i] = source, target
            self._change_state("copy_pages", pages)

    def _load_slots(self, batch: Batch) -> None:
        for row in batch.rows:
            sample = row.sample
            if row.new_slot and needs_slot_load(sample.params):
                prompt = sample.request.prompt_token_ids
                config = self._model.config
                outputs = sample.token_ids[len(prompt) :]
                for load in slot_loads(sample.slot, sample.params, prompt, outputs, config.eos_token_ids, config.vocab_size):
                    self._change_state("load_slot", load)

    def _add_page_entries(self, entries: np.ndarray) -> None:
        for begin in range(0, len(entries), PAGE_ENTRIES):
            upload = np.full((PAGE_ENTRIES, entries.shape[1]), self._config.max_batch_size, np.int32)
            upload[: len(entries) - begin] = entries[begin : begin + PAGE_ENTRIES]
            self._change_state("add_page_entries", upload)

    def _change_state(self, program: str, upload: np.ndarray) -> None:
        self._state = self._compiled[ProgramKey(program)](self._state, self._upload(upload))

    def _upload(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._replicated)

    def _layout(self, bucket: Bucket) -> BatchLayout:
        return BatchLayout.of(bucket, len(self._plan.num_pages), self._config.page_size)
