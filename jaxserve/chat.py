"""Terminal chat with a running server, streamed from /v1/chat/completions."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from jaxserve.client import Client, ServerError, connect
from jaxserve.config import option

HELP = "/reset forgets the conversation, /quit or ctrl-d leaves, ctrl-c stops an answer."
# Model text must not move the cursor or set the terminal's title: control characters but tab and line feed are dropped.
CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Whom to chat with, and how."""

    url: str = option("http://127.0.0.1:3000", "The server.", metavar="URL")
    model: str | None = option(None, "Model name to ask for. Default: the first of /v1/models.", metavar="NAME")
    system: str | None = option(None, "System prompt.")
    temperature: float | None = option(None, "0 is greedy. Default: the server's.", low=0)
    max_tokens: int | None = option(None, "Most tokens of an answer. Default: the server's.", low=1)
    api_key: str | None = option(None, "Sent as a bearer token.", metavar="KEY")


class Conversation:
    """Messages so far; each turn is sent with all of them."""

    def __init__(self, options: ChatOptions):
        self._options = options
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self._options.system}] if self._options.system else []

    async def say(self, client: Client, text: str) -> AsyncIterator[str]:
        """Send a turn and yield the pieces of the answer.

        What came of an answer that is stopped midway stays in the conversation; a turn that fails is taken back.

        Raises:
            ServerError: from the client.
        """
        body: dict[str, Any] = {
            "model": self._options.model or (await client.models())[0]["id"],
            "messages": [*self.messages, {"role": "user", "content": text}],
            "temperature": self._options.temperature,
            "max_tokens": self._options.max_tokens,
        }
        pieces: list[str] = []
        failed = False
        try:
            async for event in client.stream("/v1/chat/completions", {name: value for name, value in body.items() if value is not None}):
                for choice in event.get("choices", ()):
                    if piece := choice.get("delta", {}).get("content"):
                        pieces.append(piece)
                        yield piece
        except ServerError:
            failed = True
            raise
        finally:
            if not failed:
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]


def run_chat(options: ChatOptions) -> int:
    """Chat until the end of the input.

    Returns:
        0, or 1 where input is no terminal and a turn failed.
    """
    console, conversation = Console(highlight=False), Conversation(options)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history for input()

        console.print(f"[dim]{options.url}. {HELP}[/]")
    for text in _turns(console, interactive):
        if text in ("/quit", "/exit"):
            break
        if text == "/help":
            console.print(HELP)
        elif text == "/reset":
            conversation.reset()
        else:
            try:
                asyncio.run(_answer(conversation, options, text))
            except KeyboardInterrupt:
                console.print("\n[dim]stopped[/]")
            except ServerError as error:
                print(f"jaxserve chat: {error}", file=sys.stderr)
                if not interactive:
                    return 1
    return 0


async def _answer(conversation: Conversation, options: ChatOptions, text: str) -> None:
    async with connect(options.url, options.api_key) as client:
        answer = conversation.say(client, text)
        try:
            async for piece in answer:
                sys.stdout.write(piece.translate(CONTROLS))
                sys.stdout.flush()
        finally:
            await answer.aclose()  # type: ignore[attr-defined]  of a generator
        sys.stdout.write("\n")


def _turns(console: Console, interactive: bool) -> Iterator[str]:
    """What the user types: lines that are not blank, up to the end of the input."""
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()
