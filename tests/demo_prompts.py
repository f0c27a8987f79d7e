"""Twenty prompts for the demo model: chat and plain text, code, long, several scripts, an empty system prompt."""

from typing import Any

_LONG = (
    "The lighthouse at the end of the peninsula had been kept by the same family for five generations. Each keeper wrote a log of the "
    "weather, the passing ships and the small events of the village. In the winter of the great storm the lamp failed twice, and the "
    "keeper's daughter carried oil up the two hundred steps every hour until dawn. When the inspectors came in spring they found the "
    "glass cracked, the walls salted white, and the log complete. "
)


def _chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": messages + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def _text(text: str) -> dict[str, Any]:
    return {"text": text}


PROMPTS: dict[str, dict[str, Any]] = {
    "capital": _chat("What is the capital of France?"),
    "story": _chat("Tell me a short story about a fox and a river."),
    "empty-system": _chat("List three fruits.", system=""),
    "pirate-system": _chat("How do I boil an egg?", system="You are a pirate. Answer in one sentence."),
    "three-turns": _chat("Hi!", "Hello! How can I help you today?", "Explain photosynthesis to a child."),
    "code-question": _chat("Write a Python function that returns the n-th Fibonacci number."),
    "arithmetic": _chat("What is 17 + 25? Think step by step."),
    "translate": _chat("Translate to French: The weather is nice today."),
    "summary": _chat("Summarize this in one sentence: " + _LONG),
    "json": _chat('Describe a book as a JSON object with the keys "title", "author", "year" and "characters".'),
    "emoji": _chat("What does 🦊🌊 mean? Réponds en français, s'il te plaît."),
    "japanese": _chat("日本の首都はどこですか？ Please answer in English with three facts."),  # noqa: RUF001  a wide question mark is meant
    "plain": _text("Once upon a time, in a village by the sea,"),
    "one-word": _text("Yesterday"),
    "python": _text("def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot ="),
    "html": _text("<!DOCTYPE html>\n<html>\n<head>\n  <title>My garden</title>\n"),
    "sql": _text("CREATE TABLE customers (\n  id INTEGER PRIMARY KEY,\n"),
    "mixed-scripts": _text("Café, naïve, Zürich, Ærøskøbing, 北京, Москва and 東京 are"),
    "numbers": _text("2 + 2 = 4. 3 + 5 = 8. 10 - 7 ="),
    "long": _text(_LONG * 6 + "In the end, the most important thing that the villagers remembered was"),
}
