"""Whether the hosts were started alike."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Protocol

from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.errors import HostsDisagree

FLAGS = "flags"  # the topic
# Flags that name a host's own folders, or that only host 0 heeds.
_OWN_FLAGS = {"compilation_cache_dir", "weights_cache_override", "tokenizer_config_path"}


class Gathering(Protocol):
    """Hosts that can tell each other something (Leader and Worker are)."""

    def gather(self, topic: str, text: str) -> list[str]:
        """What each host has to tell, by its index."""
        ...


def agree(hosts: Gathering, topic: str, facts: Mapping[str, object]) -> None:
    """Make sure that facts are the same on all hosts; all of them call this, and all fail alike.

    Args:
        facts: by names that a user understands; values that JSON can hold.

    Raises:
        HostsDisagree: naming the first fact in which a host differs from host 0.
    """
    leaders, *others = (json.loads(text) for text in hosts.gather(topic, json.dumps(facts)))
    for index, theirs in enumerate(others, 1):
        if difference := disagreement(leaders, theirs, index, leaders | theirs):
            raise HostsDisagree(difference)


def disagreement(leaders: Mapping[str, object], theirs: Mapping[str, object], index: int, names: Iterable[str]) -> str:
    """The first fact of these names in which host `index` differs from host 0, in one line; "" where they agree."""
    for name in names:
        if leaders.get(name) != theirs.get(name):
            return f"the hosts disagree on {name}: {_told(leaders.get(name))} on host 0, {_told(theirs.get(name))} on host {index}"
    return ""


def flag_facts(model: ModelOptions, engine: EngineOptions) -> dict[str, object]:
    """What hosts must have been told alike, by its name on the command line."""
    given = asdict(model) | asdict(engine)
    flags: dict[str, object] = {"--" + name.replace("_", "-"): value for name, value in given.items() if name not in _OWN_FLAGS}
    return flags | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


def _told(value: object) -> str:
    return "nothing" if value is None or value == "" else json.dumps(value) if isinstance(value, bool) else str(value)
