"""The run folder: a private place for one server's sockets and metrics, gone when the server is."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "jaxserve-"
LOCK = "lock"
LONGEST_SOCKET_PATH = 100  # bytes; Linux takes 107


def make_run_folder() -> tuple[Path, int]:
    """Make a new folder, mode 0700, and remove those that dead servers of this user left.

    Returns:
        the folder and the descriptor of its lock, to be held open while the server lives.
    """
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) > LONGEST_SOCKET_PATH - 40:
        parent = Path("/tmp")
    remove_abandoned(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK).exists():
            return folder, lock
        os.close(lock)  # another server that starts took it before the lock was held, and the folder for a dead one's


def remove_abandoned(parent: Path) -> None:
    """Remove this user's run folders whose lock nobody holds."""
    for folder in parent.glob(PREFIX + "*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def engine_socket(folder: Path, replica: int) -> Path:
    """Where an engine listens."""
    return folder / f"engine-{replica}.sock"


def engine_address(folder: Path, replica: int) -> Path:
    """Where "ADDRESS:PORT" stands of an engine on another host, while it is there."""
    return folder / f"engine-{replica}.address"


def model_file(folder: Path) -> Path:
    """Where an engine tells which folder or file its model is read from, long before it is ready: then its tokenizer can be loaded."""
    return folder / "model"


def metrics_folder(folder: Path) -> Path:
    """Where http processes keep their counters."""
    return folder / "metrics"
