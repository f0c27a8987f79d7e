"""Finding a marker in text that comes in pieces."""


def held_length(text: str, marker: str) -> int:
    """How many characters at the end of the text may be the marker's beginning."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


class Marker:
    """Cuts text at a marker.

    Args:
        marker: not empty.
    """

    def __init__(self, marker: str):
        self.marker = marker
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece.

        Returns:
            The text before the marker, as far as it is sure, and the text behind it; None while the marker has not come.
        """
        text = self._held + text
        before, found, behind = text.partition(self.marker)
        if found:
            self._held = ""
            return before, behind
        length = held_length(text, self.marker)
        self._held = text[len(text) - length :]
        return text[: len(text) - length], None

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


class OptionalMarker:
    """Drops a marker, and white space before it, where it comes next.

    Args:
        marker: not empty.
    """

    def __init__(self, marker: str):
        self._marker = marker
        self._held = ""

    def push(self, text: str) -> str | None:
        """Take the next piece.

        Returns:
            The text behind the marker, or all text where another comes; None while that is not known.
        """
        text = self._held + text
        bare = text.lstrip()
        if len(bare) < len(self._marker) and self._marker.startswith(bare):
            self._held = text
            return None
        return bare.removeprefix(self._marker) if bare.startswith(self._marker) else text

    def flush(self) -> str:
        """What was held back, when nothing more comes, without a marker that was cut off."""
        return "" if self._held.strip() else self._held
