"""TGI launcher flags that jaxserve spells differently, needs no more, or does not have yet.

One that changes nothing here is accepted with a line saying why; one that asks for a feature not there yet is refused, because
serving without it would be serving something else. The environment variables that TGI reads count too: those of refused flags
are refused, those of unneeded ones pass in silence (deployments set them by the dozen). docs/tgi.md lists them all.
"""

import argparse
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from jaxserve.cli.flags import whole_number


@dataclass(frozen=True, slots=True)
class Foreign:
    """A flag of TGI's.

    Attributes:
        name: without dashes.
        why: it is unneeded or refused.
        off: values that do not ask for the feature; one that is refused is accepted with them.
    """

    name: str
    why: str
    off: tuple[str, ...] = ()


_PADDED = "prompts join the running batch at every step (TGI ignores it too, with chunked prefill)"
_RENDEZVOUS = "the devices of a host need no rendezvous, and several hosts meet at --coordinator"
UNNEEDED = (
    Foreign("waiting-served-ratio", _PADDED),
    Foreign("max-waiting-tokens", _PADDED),
    Foreign("max-batch-total-tokens", "the KV cache takes the memory there is (TGI ignores it too), see --cuda-memory-fraction"),
    Foreign("cuda-graphs", "there are no CUDA graphs to list: every batch size is compiled ahead of time"),
    Foreign("disable-custom-kernels", "there are no custom CUDA kernels: JAX compiles kernels for the device that is there"),
    Foreign("trust-remote-code", "code of a model repository is never run"),
    Foreign("shard-uds-path", "sockets are made in a private folder"),
    Foreign("master-shard-uds-path", "sockets are made in a private folder"),
    Foreign("master-addr", _RENDEZVOUS),
    Foreign("master-port", _RENDEZVOUS),
    Foreign("enable-prefill-logprobs", "log probabilities of the prompt cost only the requests that ask for them"),
    Foreign("usage-stats", "no usage data is ever sent", ("off",)),
    Foreign("max-image-fetch-size", "images are not fetched"),
    Foreign("tokenizer-name", "the tokenizer is the model's"),
)
_NONE = ("", "false", "0", "none")
REFUSED = (
    Foreign("speculate", "speculative decoding comes later", _NONE),
    Foreign("lora-adapters", "LoRA adapters come later", _NONE),
    Foreign("ngrok", "tunnels are not supported, in TGI 3 neither", _NONE),
    Foreign("ngrok-authtoken", "tunnels are not supported, in TGI 3 neither"),
    Foreign("ngrok-edge", "tunnels are not supported, in TGI 3 neither"),
)
# TGI's limits where jaxserve allows more: --tgi-strict takes them, unless others are given.
STRICT_LIMITS = {"max_concurrent_requests": 128, "max_stop_sequences": 4, "max_top_n_tokens": 5, "max_client_batch_size": 4}
_DEST = "tgi:"


def add_tgi_flags(parser: argparse.ArgumentParser) -> None:
    """Add TGI's other spellings, shown in --help, and the unneeded and refused flags, hidden but for their names."""
    reasons = "; ".join(map(_with_reason, dict.fromkeys(flag.why for flag in REFUSED)))
    told = (
        f"Accepted without effect: {', '.join('--' + flag.name for flag in UNNEEDED)}.",
        f"Refused, unless they say that the feature is not wanted: {reasons}.",
    )
    group = parser.add_argument_group("TGI", "\n".join(textwrap.fill(line, 114, break_on_hyphens=False) for line in told))
    group.add_argument("--num-shard", metavar="N", type=whole_number, help="Devices a replica: the same as --mesh 1xN.")
    sharded = "false: one device; true: all GPUs, unless --num-shard says otherwise."
    group.add_argument("--sharded", metavar="{true,false}", nargs="?", const="true", help=sharded)
    group.add_argument("--max-input-length", metavar="N", type=whole_number, help="Old name of --max-input-tokens.")
    group.add_argument("--huggingface-hub-cache", metavar="DIR", help="Folder of downloaded models: the same as HF_HUB_CACHE=DIR.")
    for flag in UNNEEDED + REFUSED:
        parser.add_argument(f"--{flag.name}", dest=_DEST + flag.name, nargs="*", help=argparse.SUPPRESS)


def apply_tgi_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    """Turn TGI's spellings into jaxserve's, warn of unneeded flags, and `parser.error` at refused ones.

    Args:
        arguments: changed in place.
        environment: of this process and those it starts; HF_HUB_CACHE may be set.
    """
    for flag in REFUSED:
        if (values := getattr(arguments, _DEST + flag.name, None)) is not None:
            _refuse(parser, flag, f"--{flag.name}", values)
        if text := environment.get(_variable(flag.name)):
            _refuse(parser, flag, f"environment variable {_variable(flag.name)}", [text])
    for flag in UNNEEDED:
        if (values := getattr(arguments, _DEST + flag.name, None)) is not None and (not values or values[0] not in flag.off):
            print(f"{parser.prog}: warning: --{flag.name} has no effect: {flag.why}", file=sys.stderr)
    if getattr(arguments, "quantize", environment.get("QUANTIZE")) == "exl2":
        parser.error("--quantize exl2: exl2 kernels exist for CUDA only, outside of JAX; take a GPTQ or AWQ checkpoint of the model")
    _apply_num_shard(parser, arguments, environment)
    limit = _old_value(parser, arguments, environment, "max_input_length", "max_input_tokens")
    if limit is not None:
        if getattr(arguments, "max_input_tokens", limit) != limit:
            parser.error("--max-input-length and --max-input-tokens say different things")
        arguments.max_input_tokens = limit
    if hasattr(arguments, "huggingface_hub_cache"):
        environment["HF_HUB_CACHE"] = arguments.huggingface_hub_cache


def apply_strict_limits(arguments: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Take TGI's limits, and all GPUs that can be seen, where neither a flag nor a variable says otherwise; `arguments` is changed."""
    for name, limit in STRICT_LIMITS.items():
        if not hasattr(arguments, name) and not environment.get(name.upper()):
            setattr(arguments, name, limit)
    if not hasattr(arguments, "mesh") and not environment.get("MESH") and _sharded(arguments, environment) != "false":
        arguments.mesh = f"1x{max(_num_gpus(environment), 1)}"


def _with_reason(why: str) -> str:
    """The refused flags that have a reason in common, and the reason."""
    return f"{', '.join('--' + flag.name for flag in REFUSED if flag.why == why)} ({why})"


def _refuse(parser: argparse.ArgumentParser, flag: Foreign, told: str, values: list[str]) -> None:
    value = values[0].lower() if values else "true"
    if value not in flag.off:
        parser.error(f"{told}: {flag.why}")


def _apply_num_shard(parser: argparse.ArgumentParser, arguments: argparse.Namespace, environment: Mapping[str, str]) -> None:
    count = _old_value(parser, arguments, environment, "num_shard", "mesh")
    sharded = _sharded(arguments, environment)
    if sharded not in ("", "true", "false"):
        parser.error(f"--sharded must be true or false. Given: {sharded}")
    if sharded == "true" and count is None and not hasattr(arguments, "mesh") and not environment.get("MESH"):
        count = _num_gpus(environment)
        if count < 2:
            parser.error(f"--sharded takes all GPUs and needs two of them; --num-shard N says how many devices. Visible: {count}")
    if sharded == "false" and count is not None and count > 1:
        parser.error(f"--sharded false and --num-shard {count} say different things")
    if count is None:
        return
    if count < 1:
        parser.error(f"--num-shard must be at least 1. Given: {count}")
    mesh = f"1x{count}"
    if getattr(arguments, "mesh", mesh).lower() != mesh:
        parser.error(f"--num-shard {count} means --mesh {mesh}, but --mesh {arguments.mesh} was given too")
    arguments.mesh = mesh


def _sharded(arguments: argparse.Namespace, environment: Mapping[str, str]) -> str:
    return getattr(arguments, "sharded", environment.get("SHARDED", "")).lower()


def _num_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that JAX would see."""
    from jaxserve.launcher.devices import visible_gpus  # late: it brings the launcher with it

    return 0 if environment.get("JAX_PLATFORMS") == "cpu" else len(visible_gpus(environment))


def _old_value(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, environment: Mapping[str, str], old: str, new: str
) -> int | None:
    """A whole number given by TGI's name: its flag, or its environment variable where jaxserve's own name is not used at all."""
    if hasattr(arguments, old):
        return getattr(arguments, old)
    text = environment.get(old.upper(), "")
    if not text or hasattr(arguments, new) or environment.get(new.upper()):
        return None
    if not text.isdecimal():
        parser.error(f"environment variable {old.upper()}: must be a whole number. Given: {text}")
    return int(text)


def _variable(name: str) -> str:
    return name.replace("-", "_").upper()
