"""Terminal chat: piped, and in a real terminal with ctrl-c."""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from fake_server import FakeServer

COMMAND = (sys.executable, "-m", "jaxserve", "chat")


def piped(server: FakeServer, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--url", server.url, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=30)


def test_piped_turns_share_a_conversation(fake_server: FakeServer) -> None:
    done = piped(fake_server, "one\n\ntwo\n/reset\nthree\n/quit\nfour\n", "--system", "Be brief.", "--temperature", "0", "--api-key", "k")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello, world!\n" * 3, "")
    roles = [[m["content"] for m in body["messages"]] for body in fake_server.bodies]
    assert roles == [["Be brief.", "one"], ["Be brief.", "one", "Hello, world!", "two"], ["Be brief.", "three"]]
    assert all(b["temperature"] == 0.0 and b["model"] == "fake-model" and "max_tokens" not in b for b in fake_server.bodies)
    assert fake_server.headers[0]["Authorization"] == "Bearer k"


def test_a_failed_turn_is_one_line_and_not_kept(fake_server: FakeServer) -> None:
    fake_server.status = 422
    fake_server.error = {"error": {"message": "too long"}}
    done = piped(fake_server, "one\ntwo\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "jaxserve chat: 422: too long\n")
    done = subprocess.run([*COMMAND, "--url", "http://127.0.0.1:9"], input="hi\n", capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (1, "jaxserve chat: no server answers at http://127.0.0.1:9\n")


def test_model_text_cannot_steer_the_terminal(fake_server: FakeServer) -> None:
    fake_server.pieces = ["\x1b]0;title\x07", "a\tb\nc", "\x9b31m"]
    assert piped(fake_server, "hi\n").stdout == "]0;titlea\tb\nc31m\n"


class Terminal:
    """The chat on a terminal of its own."""

    def __init__(self, url: str):
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            [*COMMAND, "--url", url],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_control_terminal,
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, pattern: str) -> None:
        deadline = time.monotonic() + 20
        while not re.search(pattern, self.shown, re.DOTALL):
            assert time.monotonic() < deadline, self.shown
            self.shown += os.read(self._master, 4096).decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _control_terminal() -> None:
    """Make the terminal the child's controlling one, so that ctrl-c becomes SIGINT."""
    import fcntl
    import signal
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # As a terminal's own shell would start it: where the tests run in the background, SIGINT is ignored and children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def terminal(fake_server: FakeServer) -> Iterator[Terminal]:
    opened = Terminal(fake_server.url)
    yield opened
    opened.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")  # the child starts a session
def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(fake_server: FakeServer, terminal: Terminal) -> None:
    fake_server.pieces = ["tick "] * 1000
    fake_server.delay = 0.02
    terminal.until("/quit.*> ")
    terminal.type("go\n")
    terminal.until("tick tick")
    terminal.type("\x03")
    terminal.until("stopped.*> ")
    fake_server.pieces, fake_server.delay = ["done"], 0.0
    terminal.type("next\n")
    terminal.until("done.*> ")
    assert fake_server.cancelled == 1
    assert fake_server.bodies[1]["messages"][1]["content"].startswith("tick tick")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=10) == 0
