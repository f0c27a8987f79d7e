"""ProgramStore: lowered and compiled programs, and what was learnt of them, in files that outlive the process."""

import contextlib
import hashlib
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

_DIGEST_SIZE = hashlib.sha256().digest_size


class ProgramStore:
    """A folder of immutable files by name; several processes may read and write it at once.

    A file carries a digest of its bytes: one that was damaged or half written counts as missing and is written again.

    Args:
        folder: made when something is written; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether anything was written under a name, sound or not."""
        return self.folder is not None and (self.folder / name).exists()

    def read(self, name: str) -> bytes | None:
        """What was written under a name; None where nothing sound was."""
        if self.folder is None:
            return None
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return None
        digest, data = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
        return data if hashlib.sha256(data).digest() == digest else None

    def write(self, name: str, data: bytes) -> None:
        """Keep bytes. A folder that cannot be written costs the next start time, and is no error."""
        if self.folder is None:
            return
        unfinished = self.folder / f"{name}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(hashlib.sha256(data).digest() + data)
            unfinished.replace(self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            logger.warning("programs are not kept: %s", error)
