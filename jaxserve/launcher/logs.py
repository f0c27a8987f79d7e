"""Log lines on stderr, as text or as JSON."""

import json
import logging
import time


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "message": record.getMessage(),
            "target": record.name,
            "process": record.process,
        }
        told |= getattr(record, "request", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told)


def set_up_logging(as_json: bool, level: str = "info") -> None:
    """Log to stderr what is at least as severe as `level`; called once by each process."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # They tell every request of theirs, every start and every end.
    for name in ("httpx", "httpcore", "uvicorn.error", "huggingface_hub", "jax", "grpc", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
