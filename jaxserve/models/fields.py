"""Reading untrusted configuration files by typed field."""

import math
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import UnsupportedModel


class Fields:
    """The fields of a JSON object; null counts as absent.

    Every method takes the field's name and its default, None making the field required.

    Raises:
        UnsupportedModel: one line naming the file, the field and its value, where that is missing or of the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any], file: str):
        self.values = values
        self.file = file

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        """A whole number from `low` to 2^31 - 1."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise UnsupportedModel(f"{self.file}: {name} must be a whole number of at least {low}. Given: {value!r:.80}")
        return value

    def number(self, name: str, default: float | None = None, above: float = -math.inf) -> float:
        """A number above `above`, neither infinite nor NaN (Python's JSON reader takes both)."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < 1e30:
            raise UnsupportedModel(f"{self.file}: {name} must be a number above {above:g}. Given: {value!r:.80}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise UnsupportedModel(f"{self.file}: {name} must be true or false. Given: {value!r:.80}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; empty where absent."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise UnsupportedModel(f"{self.file}: {name} must be a token id or a list of them. Given: {value!r:.80}")
        return tuple(ids)

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise UnsupportedModel(f"{self.file}: {name} is missing")
        return value
