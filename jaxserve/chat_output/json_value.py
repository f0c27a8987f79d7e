"""One JSON value in running text, let through as it comes."""

_SPACE = " \t\n\r"
_CONTROLS = {chr(code): f"\\u{code:04x}" for code in range(32)} | {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


class JsonValue:
    """Finds where a value ends. Its text is passed on unchanged, but for line breaks and the like inside strings, which models write
    and JSON forbids: they are escaped.

    The text is not checked further: a model that writes nonsense has written nonsense arguments.

    Attributes:
        done: the value is complete.
    """

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._started = False
        self._in_string = False
        self._escaped = False
        self._scalar = False

    def push(self, text: str, start: int = 0) -> tuple[str, int]:
        """Take text from `start` on.

        Returns:
            The value's next piece, and where the text goes on behind the value (its length while not done).
        """
        parts: list[str] = []
        position = start
        while position < len(text) and not self.done:
            character = text[position]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    self.done = not self._depth
                elif character < " ":
                    character = _CONTROLS[character]
            elif self._scalar:
                if character in ",]}" or character in _SPACE:
                    self.done = True
                    break
            elif character == '"':
                self._started = self._in_string = True
            elif character in "{[":
                self._started = True
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.done = True
                    if self._depth < 0:  # a value that never began
                        break
            elif character in _SPACE and not self._started:
                position += 1
                continue
            elif not self._depth:
                if character in ",:":  # no value at all
                    self.done = True
                    break
                self._started = self._scalar = True
            parts.append(character)
            position += 1
        return "".join(parts), position
