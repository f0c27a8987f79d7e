"""Stop strings, matched across any cutting of the text and never let through."""

import re
from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Aho and Corasick's automaton (1975) over the stop strings of one sample: linear in the text however many strings there are.

    The string that is completed first stops the text; of several completed by the same character, the longest. Text is held back
    only while it may still become a stop string.

    Args:
        stop: non-empty strings.
        include_stop_str: the matched string stays at the end of the text.
    """

    def __init__(self, stop: Sequence[str], include_stop_str: bool = False):
        self._include_stop_str = include_stop_str
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        # A state stands for the first `depth` characters of `spelling`: that is all the text that is held back in it.
        self._depth = [0]
        self._spelling = [""]
        self._match: list[str | None] = [None]
        for text in stop:
            self._insert(text)
        self._link()
        self._first = re.compile("[" + re.escape("".join(sorted(self._next[0]))) + "]")
        self._state = 0

    def _insert(self, text: str) -> None:
        state = 0
        for depth, character in enumerate(text, start=1):
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._fail.append(0)
                self._depth.append(depth)
                self._spelling.append(text)
                self._match.append(None)
            state = following
        self._match[state] = text

    def _link(self) -> None:
        """Breadth first: each state's longest proper suffix that is a state, and the longest stop string that ends in it."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._match[state] = self._match[state] or self._match[self._fail[state]]
            for character, following in self._next[state].items():
                self._fail[following] = self._step(self._fail[state], character)
                queue.append(following)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of text.

        Returns:
            The text that can be let through, and the stop string that was matched (None: go on). Text after a match is dropped.
        """
        state = self._state
        start = 0
        if state == 0:
            first = self._first.search(text)
            if first is None:
                return text, None
            start = first.start()
        for position in range(start, len(text)):
            state = self._step(state, text[position])
            stop = self._match[state]
            if stop is not None:
                free = self._depth[self._state] + position + 1 - (0 if self._include_stop_str else len(stop))
                return self._release(text, free, 0), stop
        return self._release(text, self._depth[self._state] + len(text) - self._depth[state], state), None

    def flush(self) -> str:
        """The text that was held back, when no more comes."""
        return self._release("", self._depth[self._state], 0)

    def _release(self, text: str, count: int, state: int) -> str:
        """The first `count` characters of what was held back plus `text`; then go to `state`."""
        held = self._depth[self._state]
        spelling = self._spelling[self._state]
        self._state = state
        return spelling[:count] if count <= held else spelling[:held] + text[: count - held]
