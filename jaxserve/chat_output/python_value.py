"""One Python literal in running text, told as JSON as it comes. Nothing is evaluated."""

import json

_SPACE = " \t\n\r"
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_ESCAPE_DIGITS = {"x": 2, "u": 4, "U": 8}
MAX_WORD = 1024
_HEX = frozenset("0123456789abcdefABCDEF")


class PythonValue:
    """Reads strings, numbers, True, False, None, lists, tuples and dicts, nested.

    Attributes:
        done: the value is complete.
        broken: the text is no such literal.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._open: list[str] = []  # closing brackets that are awaited
        self._wants_value = True
        self._separator = ""  # told before the next value, if one comes
        self._quote = ""
        self._escape: str | None = None
        self._word = ""

    def push(self, text: str, start: int = 0) -> tuple[str, int]:
        """Take text from `start` on.

        Returns:
            The next piece of JSON, and where the text goes on behind the value (its length while neither done nor broken).
        """
        parts: list[str] = []
        position = start
        while position < len(text) and not self.done and not self.broken:
            character = text[position]
            if self._quote:
                self._read_string(character, parts)
            elif self._word and not self._continues(character):
                self._end_word(parts)
                continue
            elif not self._read(character, parts):
                break
            position += 1
        return "".join(parts), position

    def flush(self) -> str:
        """The rest of it, when no more text comes."""
        parts: list[str] = []
        if self._word:
            self._end_word(parts)
        return "".join(parts)

    def _continues(self, character: str) -> bool:
        belongs = character.isalnum() or character in "_." or (character in "+-" and self._word[-1] in "eE" and self._word[0].isdigit())
        if belongs and len(self._word) < MAX_WORD:
            self._word += character
        return belongs and len(self._word) < MAX_WORD

    def _read(self, character: str, parts: list[str]) -> bool:
        """Take a character outside strings; whether it belongs to the value."""
        if self._word or character in _SPACE:
            return True
        if self._wants_value:
            if self._open and character == self._open[-1]:  # an empty container, or a comma before its end
                self._close(parts)
            elif character in _CLOSING:
                parts.append(self._separator + ("[" if character == "(" else character))
                self._separator = ""
                self._open.append(_CLOSING[character])
            elif character in "\"'":
                parts.append(self._separator + '"')
                self._separator = ""
                self._quote = character
            elif character.isalnum() or character in "+-._":
                self._word = character
            else:
                self.broken = True
        elif character == "," and self._open:
            self._separator, self._wants_value = ", ", True
        elif character == ":" and self._open and self._open[-1] == "}":
            self._separator, self._wants_value = ": ", True
        elif self._open and character == self._open[-1]:
            self._close(parts)
        else:
            self.broken = True
        return not self.broken

    def _close(self, parts: list[str]) -> None:
        closing = self._open.pop()
        parts.append("]" if closing == ")" else closing)
        self._separator = ""
        self._end_value()

    def _end_value(self) -> None:
        self._wants_value = False
        self.done = not self._open

    def _end_word(self, parts: list[str]) -> None:
        word, self._word = self._word, ""
        value = _WORDS.get(word) or _number(word)
        if value is None:
            self.broken = True
            return
        is_key = bool(self._open) and self._open[-1] == "}" and self._separator != ": "
        parts.append(self._separator + (f'"{value}"' if is_key else value))
        self._separator = ""
        self._end_value()

    def _read_string(self, character: str, parts: list[str]) -> None:
        if self._escape is not None:
            self._read_escape(self._escape + character, parts)
        elif character == "\\":
            self._escape = ""
        elif character == self._quote:
            self._quote = ""
            parts.append('"')
            self._end_value()
        else:
            parts.append(_quoted(character))

    def _read_escape(self, escape: str, parts: list[str]) -> None:
        kind, digits = escape[0], escape[1:]
        if kind in _ESCAPE_DIGITS and (not digits or digits[-1] in _HEX):
            if len(digits) < _ESCAPE_DIGITS[kind]:
                self._escape = escape
                return
            code = int(digits, 16)
            # Half a surrogate pair stands for itself in JSON too; the other half follows.
            parts.append(f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else _quoted(chr(code) if code < 0x110000 else "\ufffd"))
        elif kind in _ESCAPE_DIGITS:
            parts.append(_quoted("\\" + escape[:-1]))
            self._escape = None
            self._read_string(escape[-1], parts)
            return
        else:
            parts.append(_quoted(_ESCAPES.get(kind, kind if kind in "\\\"'" else "\\" + kind)))
        self._escape = None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _number(text: str) -> str | None:
    """A number of Python's in JSON's spelling; None if it is none, or not finite."""
    if not text.isascii():
        return None
    try:
        value: int | float = int(text, 0)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            return None
        if value in (float("inf"), float("-inf")) or value != value:
            return None
    return json.dumps(value)
