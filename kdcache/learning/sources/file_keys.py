"""Keys of files by their content, and an index that saves reading files again that did not change.

The index is private to the user and only ever a saving: it lies in the user's cache folder, one file for each folder of images,
is replaced as a whole, and one that is damaged, or of another form, is ignored.
"""

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.learning.sources.images import unreadable
from kdcache.learning.sources.source import KEY_BYTES, Keys, as_keys

THREADS = 16
"""Files that are read at a time: hashing waits for the disk, and leaves Python's lock alone."""

FILES_A_TASK = 64
"""Files that a thread takes at once: most of them are known, and handing over one by one would cost more than looking."""

TOO_FRESH_NS = 2 * 10**9
"""A file that was touched so shortly before it was read may change again within one tick of the file system's clock."""

SCHEMA = pa.schema(
    [("path", pa.binary()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("ctime_ns", pa.int64()), ("key", pa.binary(KEY_BYTES))]
)


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file does."""

    size: int
    """Bytes."""
    mtime_ns: int
    """When its content was changed, as the file says."""
    ctime_ns: int
    """When anything of it was changed, as the file system says: giving a file its old time back changes it too."""

    @classmethod
    def of(cls, status: os.stat_result) -> "FileState":
        """The state in a file's status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


Index = dict[bytes, tuple[FileState, bytes]]
"""Path to state and key."""


def file_keys(folder: Path, files: Sequence[str], *, known: Sequence[str]) -> Keys:
    """The keys of files: BLAKE2b over their bytes, [files, 16].

    Args:
        folder: Where they lie; it has an index of its own.
        files: Their absolute paths.
        known: The absolute paths of all files that belong into the index.

    Raises:
        UnreadableSampleError: A file cannot be read.
    """
    index = read_index(folder)
    tasks = [files[start : start + FILES_A_TASK] for start in range(0, len(files), FILES_A_TASK)]
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(chain.from_iterable(threads.map(lambda some: [_key_of(file, index) for file in some], tasks)))
    fresh = {os.fsencode(file): (state, key) for file, (state, key) in zip(files, found, strict=True) if state is not None}
    if any(index.get(path) != entry for path, entry in fresh.items()):
        wanted = set(map(os.fsencode, known))
        write_index(folder, {path: entry for path, entry in (index | fresh).items() if path in wanted})
    return as_keys([key for _, key in found])


def index_file(folder: Path) -> Path:
    """Where the index of a folder lies: in XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        RuntimeError: The user has no home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if base.is_absolute() else Path.home() / ".cache"
    name = hashlib.blake2b(os.fsencode(folder.absolute()), digest_size=KEY_BYTES).hexdigest()
    return base / "kdcache" / "file-keys" / name


def read_index(folder: Path) -> Index:
    """The index of a folder; empty if there is none, or it is damaged."""
    try:
        data = index_file(folder).read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return {}
        table = pq.read_table(io.BytesIO(data[32:]))
        if table.schema != SCHEMA:
            return {}
    except (OSError, RuntimeError, pa.ArrowException):
        return {}
    paths, sizes, mtimes, ctimes, keys = (table.column(name).to_pylist() for name in SCHEMA.names)
    return {path: (FileState(*state), key) for path, *state, key in zip(paths, sizes, mtimes, ctimes, keys, strict=True)}


def write_index(folder: Path, index: Index) -> None:
    """Replaces the index of a folder; where nothing can be written, there is none."""
    states = [(path, state.size, state.mtime_ns, state.ctime_ns, key) for path, (state, key) in index.items()]
    columns = zip(*states, strict=True)
    buffer = io.BytesIO()
    pq.write_table(
        pa.table([pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA),
        buffer,
        compression="zstd",
    )
    data = buffer.getvalue()
    with suppress(OSError, RuntimeError):
        path = index_file(folder)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(path, hashlib.sha256(data).digest() + data)


def _replace(path: Path, data: bytes) -> None:
    """Writes under a name that no other process has, then renames: whoever comes last wins, and nobody reads half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _key_of(file: str, index: Index) -> tuple[FileState | None, bytes]:
    """A file's state, None if it may change yet, and its key."""
    entry = index.get(os.fsencode(file))
    try:
        if entry is not None and entry[0] == FileState.of(os.stat(file)):  # noqa: PTH116
            return entry
        with open(file, "rb") as opened:  # noqa: PTH123
            begun, before = time.time_ns(), FileState.of(os.fstat(opened.fileno()))
            key = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).digest()
            after = FileState.of(os.fstat(opened.fileno()))
    except OSError as error:
        name = os.fsencode(file).decode("utf-8", "replace")
        raise unreadable(name, error.strerror or error) from error
    is_settled = before == after and max(before.mtime_ns, before.ctime_ns) < begun - TOO_FRESH_NS
    return before if is_settled else None, key
