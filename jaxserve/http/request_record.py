"""RequestRecord: what came of one HTTP request, told once, at its end: a line in the log and, where asked for, a trace.

No text of prompts or answers is told.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.http.answer import Answer

logger = logging.getLogger(__name__)

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_LONGEST_PATH = 200
_LONGEST_ERROR = 1000


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request.

    Attributes:
        method, path: as asked, the path printable and bounded.
        headers: of the request.
        request_id: as the answer's header x-request-id has it.
        client_request_id: the x-request-id that the client sent, if it is fit to be told.
        began, ended: time.time_ns().
        status: of the answer; 0 while there is none.
        error: what the client was told.
        answers: what was asked of engines.
    """

    method: str
    path: str
    headers: Headers
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    client_request_id: str = ""
    began: int = field(default_factory=time.time_ns)
    ended: int = 0
    status: int = 0
    error: str = ""
    answers: list[Answer] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """done, refused (the client's fault, or overload), failed, or aborted (the client hung up)."""
        if any(answer.dropped for answer in self.answers):
            return "aborted"
        if self.status >= 500 or any(answer.error for answer in self.answers if self.status == 200):
            return "failed"
        return "refused" if self.status >= 400 or self.error else "done"

    def fields(self) -> dict[str, Any]:
        """What there is to tell; times in seconds."""
        told: dict[str, Any] = {"request_id": self.request_id}
        if self.client_request_id:
            told["client_request_id"] = self.client_request_id
        told |= {"method": self.method, "path": self.path, "status": self.status, "outcome": self.outcome}
        told["total_time"] = round((self.ended - self.began) / 1e9, 6)
        if self.answers:
            meters = [answer.meter for answer in self.answers]
            told |= {
                "prompt_tokens": sum(len(answer.request.prompt_token_ids) for answer in self.answers),
                "cached_tokens": sum(meter.num_cached_tokens for meter in meters),
                "output_tokens": sum(sample.num_tokens for answer in self.answers for sample in answer.samples),
                "validation_time": round(max(meter.validation_time for meter in meters), 6),
                "queue_time": round(max(meter.queue_time for meter in meters), 6),
                "first_token_time": round(max(meter.first_token_time for meter in meters), 6),
                "inference_time": round(max(answer.times.inference for answer in self.answers), 6),
                "finish_reasons": [
                    sample.finish_reason.value if sample.finish_reason else None for answer in self.answers for sample in answer.samples
                ],
            }
        if error := self.error or next((answer.error for answer in self.answers if answer.error), ""):
            told["error"] = error
        return told


# Set for each request by RecordRequests, in the context that all its work runs in.
current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)


def note_error(message: str) -> None:
    """Keep what the client of the current request is told, in one line: what it sent may be quoted in it."""
    if (record := current_record.get()) is not None:
        told = message[:_LONGEST_ERROR]
        record.error = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in told)


def note_answers(answers: Sequence[Answer]) -> None:
    """Keep what the current request asks of engines."""
    if (record := current_record.get()) is not None:
        record.answers += answers


class RecordRequests:
    """Middleware that gives every request a record and an x-request-id, and tells the record at the end.

    Args:
        app: what answers.
        tell: each takes the record.
    """

    def __init__(self, app: ASGIApp, tell: Sequence[Callable[[RequestRecord], None]]):
        self._app = app
        self._tell = tuple(tell)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"].encode("unicode_escape").decode()[:_LONGEST_PATH]
        record = RequestRecord(scope["method"], path, headers)
        if _CLIENT_ID.fullmatch(client_id := headers.get("x-request-id", "")):
            record.client_request_id = client_id
        token = current_record.set(record)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                own = next((value for name, value in message["headers"] if name == b"x-request-id"), None)
                if own is None:
                    message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
                else:
                    record.request_id = own.decode()
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            record.status = record.status or 500
            raise
        finally:
            current_record.reset(token)
            record.ended = time.time_ns()
            for tell in self._tell:
                tell(record)


def log_record(record: RequestRecord) -> None:
    """One line for every request that asked for work or was refused; pages, and probes whatever they heard, only with --log-level debug."""
    level = logging.INFO if record.method == "POST" or record.status not in (200, 304, 503) else logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    told = record.fields()
    shown = " ".join(f"{name}={value}" for name, value in told.items() if name not in ("method", "path", "status", "error"))
    error = f": {told['error']}" if "error" in told else ""
    logger.log(level, "%s %s %d %s%s", record.method, record.path, record.status, shown, error, extra={"request": told})
