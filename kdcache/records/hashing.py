"""Digests: canonical JSON, sha256 of bytes and files. Every digest string carries its algorithm."""

import hashlib
import json
from pathlib import Path


def canonical_json(document: object) -> bytes:
    """The one byte string for a JSON document: keys sorted, no white space, UTF-8, no NaN."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(data: bytes) -> str:
    """The digest of `data` as `sha256:<64 hex digits>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def sha256_file(path: Path) -> str:
    """The digest of a file's bytes as `sha256:<64 hex digits>`."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def stable_integer(*parts: bytes | int | str) -> int:
    """A 63-bit integer that depends on every part and on nothing else: the root of all keyed randomness.

    Each part is length-prefixed, so that ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1
