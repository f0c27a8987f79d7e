"""A machine for the few PTX instructions of the all-reduce: threads of several GPUs over one memory of words, in any interleaving."""

import random
import re
from collections.abc import Generator, Sequence

EMPTY = 0xFFFFFFFF


class Trap(Exception):
    """A thread gave up waiting."""


class Memory:
    """Words of 32 bits by their address; `places` are addresses that start empty and must be empty when something is written to them."""

    def __init__(self, is_place):
        self.words: dict[int, int] = {}
        self.is_place = is_place

    def load(self, address: int) -> int:
        assert address % 4 == 0
        return self.words.get(address, EMPTY if self.is_place(address) else 0)

    def store(self, address: int, word: int) -> None:
        if self.is_place(address) and word != EMPTY:
            assert self.load(address) == EMPTY, "a part was overwritten before it was read"
        self.words[address] = word


def compute(kind: list[str], n: list[int]) -> int:
    """The result of an instruction, `kind` its name's parts, before it is cut to its width."""
    match kind[0]:
        case "setp":
            return int((n[0] > n[1] if kind[1] == "gt" else n[0] == n[1]) or (kind[2] == "or" and bool(n[2])))
        case "selp":
            return n[0] if n[2] else n[1]
        case "mov":
            return n[0]
        case "and":
            return n[0] & n[1]
        case "add":
            return n[0] + n[1]
        case "sub":
            return n[0] - n[1]
        case "mul":
            return n[0] * n[1]
        case "mad":
            return n[0] * n[1] + n[2]
    raise AssertionError(f"an instruction that is not known: {kind}")


def run_thread(
    text: str, thread: int, operands: Sequence[int], num_results: int, memory: Memory, clock=lambda: 0
) -> Generator[None, None, list[int]]:
    """Execute one thread; yields before each access of a word, and returns the result registers."""
    lines = [line.strip().rstrip(";") for line in text.strip().strip("{}").split("\n") if line.strip() and not line.startswith(".reg")]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    registers = {f"${num_results + i}": value for i, value in enumerate(operands)}

    def value(name: str) -> int:
        if name.startswith("{"):
            low, high = name.strip("{}").split(", ")
            return value(low) | value(high) << 32
        special = {"%tid.x": lambda: thread, "%clock64": clock}
        return special[name]() if name in special else registers[name] if name[0] in "%$" else int(name, 0)

    at = 0
    while at < len(lines):
        line, at = lines[at], at + 1
        if guard := re.match(r"@(%\w+) (.*)", line):
            if not registers[guard[1]]:
                continue
            line = guard[2]
        if line.endswith(":") or line.startswith("fence."):
            continue
        if line == "trap":
            raise Trap
        if line.startswith("bra "):
            at = labels[line[4:]]
            continue
        name, rest = line.split(" ", 1)
        arguments = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", rest)]
        if name.startswith(("ld.", "st.")):
            place = next(part for part in arguments if part.startswith("["))
            base, _, offset = place.strip("[]").partition(" + ")
            words = next(part for part in arguments if part != place).strip("{}").split(", ")
            assert name.split(".")[1:4] == ["relaxed", "sys", "global"] and len(words) == (4 if ".v4." in name else 1)
            address = value(base) + int(offset or 0)
            assert address % (4 * len(words)) == 0
            for i, word in enumerate(words):
                yield
                if name.startswith("ld."):
                    registers[word] = memory.load(address + 4 * i)
                else:
                    memory.store(address + 4 * i, value(word))
            continue
        target, *sources = arguments
        kind, numbers = name.split("."), [value(source) for source in sources]
        mask = 2**64 - 1 if kind[-1] in ("u64", "b64") or "wide" in kind else EMPTY
        registers[target] = compute(kind, numbers) & mask
    return [registers[f"${i}"] for i in range(num_results)]


def run_all(threads: Sequence[Generator[None, None, list[int]]], chance: random.Random) -> list[list[int]]:
    """Run them to their ends, one access of one of them at a time, some of them for long stretches."""
    running, results = dict(enumerate(threads)), {}
    for _ in range(100_000):
        if not running:
            return [results[index] for index in range(len(threads))]
        index = chance.choice(list(running))
        for _ in range(chance.choice((1, 3, 40))):
            try:
                next(running[index])
            except StopIteration as end:
                results[index] = end.value
                del running[index]
                break
    raise AssertionError("threads wait for each other for ever")
