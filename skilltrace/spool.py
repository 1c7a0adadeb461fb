"""The folder of journals on disk: where it is, who may read it, and which process holds which part.

    <spool>/                      0700
        20260131T101500-4711-1f2e3d4c/
            journal.jsonl         0600, appended to by its process, which holds a lock on it while it lives
            delivery.lock         locked by whoever delivers this journal
            cursor.json           how far delivery has come, and the runs still open there
            context.json          tags that MLflow finds for the process (git commit, notebook), once it is loaded
            blobs/                contents too large for a line
        rejected/                 what MLflow refused for good, by journal, with the reason

The locks are `flock`s: the kernel lets go of them when their process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skilltrace.errors import JournalError
from skilltrace.faults import warn_once

JOURNAL = "journal.jsonl"
CURSOR = "cursor.json"
CONTEXT = "context.json"
BLOBS = "blobs"
_DELIVERY_LOCK = "delivery.lock"
_REJECTED = "rejected"


def fallback() -> Path:
    """Where journals go when the configured folder cannot be written."""
    return Path(tempfile.gettempdir()) / f"skilltrace-{os.getuid()}"


def create_journal(spool: Path) -> tuple[Path, int]:
    """A new journal's folder and the descriptor of its file, locked for this process.

    Raises:
        JournalError: where neither the folder nor the fallback can be written.
    """
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        return _create(spool, name)
    except OSError as error:
        other = fallback()
        try:
            created = _create(other, name)
        except OSError:
            raise JournalError(
                f"the spool folder {spool} cannot be written ({error}), and neither can {other}; "
                "set SKILLTRACE_SPOOL_DIR or configure(spool_dir=…) to a folder of yours"
            ) from error
        warn_once(
            ("spool", str(spool)),
            "The spool folder %s cannot be written (%s); runs are journaled in %s. Set SKILLTRACE_SPOOL_DIR or "
            "configure(spool_dir=…) to a folder that outlives this machine's temporary files.",
            spool,
            error,
            other,
        )
        return created


def prepare(spool: Path) -> None:
    """Have the folder there, ours and closed to others. Raises OSError where that cannot be."""
    spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(spool)


def _create(spool: Path, name: str) -> tuple[Path, int]:
    prepare(spool)
    # Under a hidden name until its lock is held: nobody may take it for a dead process's journal in between.
    hidden, folder = spool / f".{name}", spool / name
    hidden.mkdir(mode=0o700)
    descriptor = os.open(hidden / JOURNAL, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return folder, descriptor


def _check_private(folder: Path) -> None:
    """Refuse a folder of another user's; close one of ours to others."""
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        folder.chmod(0o700)


def journals(spool: Path) -> list[Path]:
    """The folders of the journals in a spool, the oldest first; none where it is not ours."""
    try:
        _check_private(spool)
        return sorted(path for path in spool.iterdir() if (path / JOURNAL).is_file() and path.name[0] != ".")
    except OSError:
        return []


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the lock of a file while the block runs; False where another process (or descriptor) has it."""
    descriptor = try_lock(path, create=True)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def try_lock(path: Path, *, create: bool = False) -> int | None:
    """A descriptor that holds the file's lock, or None where somebody else holds it or the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # else: removed by another deliverer between our open and our lock
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


@contextmanager
def opening(uri: str, spool: Path) -> Iterator[None]:
    """Hold, for the first use of a local database, a lock that all processes of this spool share."""
    local = uri.startswith("sqlite")
    try:
        if local:
            prepare(spool)
    except OSError:
        local = False  # the journal's side says that the folder cannot be written
    if not local:
        yield
        return
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    path = spool / f".store-{name}.lock"
    deadline = time.monotonic() + 60
    pause = threading.Event()  # never set: a lock of another process has no event to wait for
    while True:
        with held(path) as mine:
            if mine or time.monotonic() > deadline:
                yield
                return
        pause.wait(0.05)


def lock_delivery(folder: Path) -> int | None:
    """The right to deliver a journal, as a descriptor to close; None where another has it."""
    return try_lock(folder / _DELIVERY_LOCK, create=True)


def owner_is_alive(folder: Path) -> bool:
    """Whether the process that writes the journal still runs."""
    descriptor = try_lock(folder / JOURNAL)
    if descriptor is None:
        return (folder / JOURNAL).exists()
    os.close(descriptor)
    return False


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_EXCL, 0o600)
    try:
        write_all(descriptor, content)
    finally:
        os.close(descriptor)
    temporary.replace(path)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of the content; one `write` call unless the disk is full or a signal came in between."""
    written = os.write(descriptor, content)
    while written < len(content):
        written += os.write(descriptor, content[written:])


def append_rejected(folder: Path, line: bytes) -> None:
    """Keep a line about something that MLflow refused, beside the journals."""
    rejected = folder.parent / _REJECTED
    rejected.mkdir(mode=0o700, exist_ok=True)
    path = rejected / f"{folder.name}.jsonl"
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, line)
    finally:
        os.close(descriptor)


def rejected_files(spool: Path) -> list[Path]:
    """The files of what MLflow refused, the oldest first."""
    return sorted((spool / _REJECTED).glob("*.jsonl"))


def remove(folder: Path) -> None:
    """Remove a journal that is delivered. The file that says it is a journal goes first."""
    (folder / JOURNAL).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    folder.rmdir()
