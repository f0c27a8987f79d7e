"""Break the code on purpose, one way at a time, and check that the tests notice.

    python scripts/mutate.py                 # all mutations
    python scripts/mutate.py rope window     # those whose name contains one of the words

Each mutation is applied to a copy of the tree, where the tests that should notice it are run. Run by hand, not in CI. Exits
non-zero where a mutation survives, where its text is no longer in the file, or where the tests fail without any mutation.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("jaxserve", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """One defect.

    Attributes:
        name: what is wrong.
        file: below jaxserve/.
        old, new: text that occurs once in the file, and what replaces it.
        tests: pytest arguments, below tests/.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def golden(*names: str) -> tuple[str, ...]:
    """The tests that compare tiny checkpoints with transformers."""
    return tuple(f"test_models.py::test_tokens_and_logits_equal_transformers[{name}]" for name in names)


SHARDED = ("test_models.py::test_tensor_parallel_equals_transformers",)

UNDER_LOAD = ("test_exactness.py::test_load_changes_no_token",)

MUTATIONS = (
    Mutation(
        "rope scaling dropped", "models/rope.py", "_rope(_llama3(plain, fields, original))", "_rope(plain)", golden("llama-rope-llama3")
    ),
    Mutation("rope factor ignored", "models/rope.py", "_rope(plain / factor, context", "_rope(plain, context", golden("llama-rope-linear")),
    Mutation(
        "yarn's attention factor dropped",
        "models/rope.py",
        "jnp.cos(angles)[:, None, :] * self.scale",
        "jnp.cos(angles)[:, None, :]",
        golden("llama-rope-yarn"),
    ),
    Mutation(
        "rope theta ignored",
        "models/rope.py",
        'theta = fields.number("rope_theta", default_theta, above=0.0)',
        "theta = default_theta",
        golden("llama"),
    ),
    Mutation(
        "rope turns backwards",
        "pallas_kernels/rotate_and_write_kv/reference.py",
        "first * cos - second * sin",
        "first * cos + second * sin",
        golden("llama"),
    ),
    Mutation(
        "gate and up swapped", "models/decoder.py", '("mlp.gate_proj", "mlp.up_proj")', '("mlp.up_proj", "mlp.gate_proj")', golden("llama")
    ),
    Mutation(
        "bias missing",
        "pallas_kernels/rotate_and_write_kv/reference.py",
        " + bias[None, :].astype(jnp.float32)",
        "",
        golden("qwen2"),
    ),
    Mutation(
        "bias added once a shard",
        "models/layers.py",
        "else y + self.bias[...][None, :]",
        'else y + (jax.lax.axis_size("tensor") if self.reduce else 1) * self.bias[...][None, :]',
        (f"{SHARDED[0]}[llama-bias-2]",),
    ),
    Mutation(
        "query and key norms missing",
        "pallas_kernels/rotate_and_write_kv/reference.py",
        "if norms is not None:",
        "if False:",
        golden("qwen3"),
    ),
    Mutation("epsilon ignored", "pallas_kernels/add_rms_norm/reference.py", "+ eps)", "+ 1e-6)", golden("llama")),
    Mutation(
        "norm's weight ignored",
        "pallas_kernels/add_rms_norm/reference.py",
        "weight = weight.reshape(",
        "weight = jnp.ones_like(weight).reshape(",
        golden("llama"),
    ),
    Mutation(
        "final norm missing",
        "models/decoder.py",
        "normed, _ = self.norm(Branch(x), jnp.zeros_like(x), Shards(), self.norm.weight[...].dtype)",
        "normed = x",
        golden("llama"),
    ),
    Mutation("tied head replaced", "models/decoder.py", "(self.head or self.embedding)", "(self.embedding)", golden("llama")),
    Mutation(
        "KV heads spread instead of repeated",
        "models/parameters.py",
        "shard * min(shards, self.units) // shards * local",
        "shard % min(shards, self.units) * local",
        (f"{SHARDED[0]}[qwen3-bias-4]",),
    ),
    Mutation(
        "keys and values swapped",
        "pallas_kernels/rotate_and_write_kv/reference.py",
        "write_kv(kv, rotate(k, rotation), v, metadata, scales)",
        "write_kv(kv, v, rotate(k, rotation), metadata, scales)",
        golden("llama"),
    ),
    Mutation("window off by one", "models/decoder.py", "window=self.window,", "window=self.window and self.window + 1,", golden("mistral")),
    Mutation("windows begin a layer late", "models/family.py", "i >= full_layers", "i > full_layers", golden("qwen2-windows")),
    Mutation(
        "attention scale of the hidden size",
        "models/decoder.py",
        "scale=self.head_dim**-0.5",
        "scale=(self.head_dim * 2) ** -0.5",
        golden("llama"),
    ),
    Mutation(
        "sum over shards missing",
        "models/layers.py",
        "if x.shared:",
        "if False:",
        (f"{SHARDED[0]}[llama-bias-2]",),
    ),
    Mutation(
        "vocabulary shard off by one",
        "models/layers.py",
        'jax.lax.axis_index("tensor") * local',
        'jax.lax.axis_index("tensor") * (local - 1)',
        (f"{SHARDED[0]}[llama-mha-tied-8]",),
    ),
    Mutation(
        "end tokens of generation_config.json ignored",
        "models/config.py",
        'generation.token_ids("eos_token_id") + fields',
        "fields",
        ("test_models_config.py::test_generation_config_is_honoured",),
    ),
    Mutation(
        "GGUF rows left permuted",
        "weights/gguf_file.py",
        "if any(infix in name for infix in self._permuted) else part",
        "if False else part",
        ("test_gguf.py::test_same_arrays_and_shape_as_the_folder",),
    ),
    Mutation(
        "untied head taken for tied",
        "weights/checkpoint.py",
        "return all(np.array_equal(one, other) for one, other in pairs)",
        "return True",
        ("test_weights.py::test_head_beside_tied_embeddings",),
    ),
    Mutation(
        "page table off by one",
        "runner/batch.py",
        "table[slots[row], positions // plan.page_size]",
        "table[slots[row], (positions + 1) // plan.page_size]",
        UNDER_LOAD,
    ),
    Mutation("token of the wrong slot fed back", "runner/batch.py", "last_tokens[slots[row], 0]", "last_tokens[row, 0]", UNDER_LOAD),
    Mutation("causal mask shifted", "pallas_kernels/paged_attention/xla.py", "visible = behind >= 0", "visible = behind >= -1", UNDER_LOAD),
    Mutation(
        "repetition penalty ignored",
        "pallas_kernels/token_options.py",
        "value / repeated, value * repeated",
        "value, value",
        ("test_sampler.py",),
    ),
    Mutation("frequency penalty ignored", "pallas_kernels/token_options.py", "frequency * outputs + ", "", ("test_sampler.py",)),
    Mutation(
        "kernel: top_p of a flat distribution unchecked",
        "pallas_kernels/token_choice/race.py",
        "done = unchecked | (above < row.top_p * whole)",
        "done = unchecked | (above < jnp.inf)",
        ("test_token_choice.py",),
    ),
    Mutation(
        "kernel: one token too few gathered",
        "pallas_kernels/token_choice/truncation.py",
        "return count + more\n",
        "return count + more - (more > 1).astype(jnp.int32)\n",
        ("test_token_choice.py",),
    ),
    Mutation(
        "kernel: mass below the list forgotten",
        "pallas_kernels/token_choice/truncation.py",
        "found = below + _sum(",
        "found = _sum(",
        ("test_token_choice.py",),
    ),
    Mutation(
        "kernel: blocks that may win passed over",
        "pallas_kernels/token_choice/row.py",
        "highest * uniform * _A_LITTLE_LESS",
        "highest * uniform * 4.0",
        ("test_token_choice.py",),
    ),
    Mutation(
        "kernel: the wrong slot's penalties",
        "pallas_kernels/token_choice/row.py",
        "self._counts_ref.at[self.slot, place]",
        "self._counts_ref.at[self.number, place]",
        ("test_token_choice.py",),
    ),
    Mutation(
        "steps not cut to a compiled size",
        "scheduler/prefill_budget.py",
        "return smaller if padding > most_padding",
        "return smaller if padding > 10**9",
        ("test_scheduler.py",),
    ),
    Mutation(
        "min_tokens off by one",
        "runner/sampling_rows.py",
        "num_output_tokens < self._min_tokens[slots]",
        "num_output_tokens <= self._min_tokens[slots]",
        ("test_sampler.py",),
    ),
    Mutation(
        "prefix found under another's salt",
        "page_key.py",
        "sha256(parent + tokens + extras)",
        "sha256(parent + tokens)",
        ("test_scheduler.py",),
    ),
    Mutation(
        "prefix found behind another past",
        "page_key.py",
        "sha256(parent + tokens + extras)",
        "sha256(tokens + extras)",
        ("test_scheduler.py", "test_scheduler_simulation.py"),
    ),
)


def run_tests(tree: Path, tests: tuple[str, ...]) -> int:
    """pytest's exit status on a copy of the tree: 0 passed, 1 failed, others mean that nothing was tested."""
    # The folder of the copy comes first on sys.path, ahead of the installed jaxserve.
    arguments = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    return subprocess.run(arguments, cwd=tree, capture_output=True).returncode


def copy_tree(target: Path) -> None:
    """What the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def survives(mutation: Mutation) -> str:
    """What is wrong with the tests, or "" if they notice the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        path = tree / "jaxserve" / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return f"its text occurs {text.count(mutation.old)} times in {mutation.file}"
        path.write_text(text.replace(mutation.old, mutation.new))
        status = run_tests(tree, mutation.tests)
        return {0: "SURVIVED", 1: ""}.get(status, f"pytest exited with {status}")


def main() -> None:
    """Run the mutations that are asked for."""
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        status = run_tests(Path(folder), tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests)))
    if not chosen or status:
        raise SystemExit(f"the tests of {len(chosen)} mutations do not pass without them (pytest exited with {status})")
    problems = 0
    for mutation in chosen:
        started = time.monotonic()
        problem = survives(mutation)
        problems += bool(problem)
        print(f"{problem or 'noticed':10} {mutation.name} ({time.monotonic() - started:.0f} s)", flush=True)
    raise SystemExit(f"{problems} of {len(chosen)} mutations were not noticed" if problems else 0)


if __name__ == "__main__":
    main()
