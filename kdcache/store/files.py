"""Files that are either whole or not there, and a lock that dies with its process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache.records.errors import CacheBusyError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import FileRecord


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Writes a file so that any reader, even after a power cut, sees all of `data` or what was there before.

    Temporary file, fsync, rename, fsync of the directory.
    """
    temporary = path.with_name(f".{path.name}.partial")
    _make_folder(path.parent)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def put_in_place(source: Path, target: Path) -> None:
    """Moves a file that is on the disk already, so that any reader sees it or what was there before."""
    _make_folder(target.parent)
    source.replace(target)
    sync_directory(target.parent)


def _make_folder(path: Path) -> None:
    """Makes a folder and those above it, each entry synced into the one that holds it."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames and removals inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, *, holder: str) -> Iterator[None]:
    """Holds a lock file while the body runs; the kernel frees it when the process dies, however it dies.

    Args:
        path: The lock file; made if need be.
        holder: What the lock is for, for the message of the one who comes second.

    Raises:
        CacheBusyError: Another process holds it.
    """
    _make_folder(path.parent)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CacheBusyError(f"{holder} is already running there (process {pid}, lock {path}); wait for it or stop it") from error
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # the holder before us removed the file between our open and our lock
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def write_record(root: Path, path: str, data: bytes) -> FileRecord:
    """Writes a file of a store atomically and gives its record."""
    write_atomically(root / path, data)
    return FileRecord(path=path, size_bytes=len(data), sha256=sha256(data))
