"""PrefixIndex: which prefixes of prompts an engine was sent."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """Keys of pages (page_key), of the prompts that were sent to one engine; of too many the least recently sent are forgotten.

    It guesses at the engine's prefix cache, which forgets in the same order but also holds answers, and pages of other http processes.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of a prompt's first pages were sent."""
        return next((place for place, key in enumerate(keys) if key not in self._keys), len(keys))

    def add(self, keys: Sequence[bytes], most: int) -> None:
        """A prompt is sent; of all keys `most` are kept."""
        for key in reversed(keys):  # a prompt's first page is forgotten last, because without it the others are never found
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > most:
            self._keys.popitem(last=False)

    def clear(self) -> None:
        """The engine has lost its cache."""
        self._keys.clear()
