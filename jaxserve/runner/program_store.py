"""ProgramStore: lowered and compiled programs, and what was learnt of them, in files that outlive the process.

What nobody has used for long is deleted once a folder is large, since each version of jaxserve, JAX and XLA has programs of its own. When
an entry was used last is its file's modification time. A start marks all that it will read as used before it reads anything, and
whoever cleans spares what was used within the hour: so starts at the same time take nothing from each other. Should an
entry be gone nevertheless, the program is compiled again. What `jaxserve compile` prepared is listed in the folder and never deleted.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

_DIGEST_SIZE = hashlib.sha256().digest_size
_PREPARED = "prepared-"  # begins the names of files that list entries
_LONGEST_START = 3600.0  # seconds
_CLOCKS_DIFFER = 60.0  # seconds, this machine's and a file server's


class _Entry(NamedTuple):
    used: float  # seconds since 1970
    name: str
    size: int  # bytes


class ProgramStore:
    """A folder of immutable files by name; several processes may read and write it at once.

    A file carries a digest of its bytes: one that was damaged or half written counts as missing and is written again.

    Args:
        folder: made when something is written; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether anything was written under a name, sound or not; it counts as used."""
        if self.folder is None:
            return False
        self._used.add(name)
        try:
            os.utime(self.folder / name)
        except OSError:  # it is not there, or it is another user's
            return (self.folder / name).exists()
        return True

    def read(self, name: str) -> bytes | None:
        """What was written under a name; None where nothing sound was."""
        if self.folder is None:
            return None
        self._used.add(name)
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return None
        digest, data = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
        return data if hashlib.sha256(data).digest() == digest else None

    def write(self, name: str, data: bytes) -> None:
        """Keep bytes. A folder that cannot be written costs the next start time, and is no error."""
        self._used.add(name)
        self._write(name, hashlib.sha256(data).digest() + data)

    def clean(self, most_bytes: int) -> None:
        """Delete what was used longest ago until no more than `most_bytes` are left; nothing that this store was asked for, or was listed.

        Also what writers left that died.
        """
        entries = list(self._entries())
        spared = self._used | {name for entry in entries if entry.name.startswith(_PREPARED) for name in self._listed(entry.name)}
        of_starts = max((entry.used for entry in entries), default=0.0) - _LONGEST_START
        total = sum(entry.size for entry in entries)
        for used, name, size in sorted(entries):
            unfinished = "." in name
            if used >= of_starts or (total <= most_bytes and not unfinished):
                continue
            if name in spared or name.startswith(_PREPARED):
                continue
            self._delete(name)
            total -= size

    def keep_used(self, since: float) -> None:
        """List what was used since a time (seconds since 1970), by whomever, as prepared: it is never deleted."""
        used = sorted(entry.name for entry in self._entries() if entry.used >= since - _CLOCKS_DIFFER)
        names = [name for name in used if "." not in name and not name.startswith(_PREPARED)]
        if names:
            listed = "\n".join(names).encode()
            self._write(_PREPARED + hashlib.sha256(listed).hexdigest(), listed)

    def _entries(self) -> Iterator[_Entry]:
        """What is in the folder; other processes may add and delete meanwhile."""
        with contextlib.suppress(OSError):
            for file in os.scandir(self.folder) if self.folder is not None else ():
                with contextlib.suppress(OSError):
                    told = file.stat()
                    yield _Entry(told.st_mtime, file.name, told.st_size)

    def _listed(self, name: str) -> list[str]:
        assert self.folder is not None
        try:
            return (self.folder / name).read_text().split()
        except OSError:
            return []

    def _delete(self, name: str) -> None:
        assert self.folder is not None
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            (self.folder / name).unlink()

    def _write(self, name: str, data: bytes) -> None:
        if self.folder is None:
            return
        unfinished = self.folder / f"{name}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(data)
            unfinished.replace(self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            logger.warning("programs are not kept: %s", error)
