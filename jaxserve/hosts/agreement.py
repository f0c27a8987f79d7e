"""Whether the hosts were started alike."""

import json
from collections.abc import Mapping
from typing import Protocol

from jaxserve.errors import HostsDisagree


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
        for name in leaders | theirs:
            if leaders.get(name) != theirs.get(name):
                raise HostsDisagree(
                    f"the hosts disagree on {name}: {_told(leaders.get(name))} on host 0, {_told(theirs.get(name))} on host {index}"
                )


def _told(value: object) -> str:
    return "nothing" if value is None or value == "" else json.dumps(value) if isinstance(value, bool) else str(value)
