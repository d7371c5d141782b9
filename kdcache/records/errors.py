"""Every error that kdcache raises on purpose: one base, one subclass per thing a user can mend.

A subclass also inherits the natural built-in, so `except FileNotFoundError` keeps working, and owns the exit code of
the command line: 1 failed, 2 usage, spec or configuration, 3 damaged or mismatched data.
"""

from collections.abc import Sequence
from typing import ClassVar


class KdcacheError(Exception):
    """Base of all errors that kdcache raises on purpose."""

    exit_code: ClassVar[int] = 1


class SpecError(KdcacheError, ValueError):
    """A spec string, an augmentation file or one of their options cannot be understood."""

    exit_code = 2


class ConfigError(KdcacheError, ValueError):
    """A setting, or a combination of settings, makes no sense."""

    exit_code = 2


class CheckpointError(KdcacheError, ValueError):
    """A model file is missing, unreadable, unsafe, or does not fit its architecture."""

    exit_code = 3


class TeacherError(KdcacheError, ArithmeticError):
    """The teacher gave something that cannot be stored: NaN, infinity, or a wrong shape."""


class CacheNotFoundError(KdcacheError, FileNotFoundError):
    """There is no cache where one was asked for."""

    exit_code = 2


class CacheBusyError(KdcacheError, BlockingIOError):
    """Another process is writing to the same directory."""


class ExistsError(KdcacheError, FileExistsError):
    """Something else is already where the result should go; the differing fields are listed."""

    exit_code = 3


class CacheExistsError(ExistsError):
    """Another recipe's cache is already there; the message lists the recipe fields that differ."""


class IncompleteCacheError(KdcacheError, RuntimeError):
    """A dump was begun here and has not been finished."""

    exit_code = 3


class FormatError(KdcacheError, ValueError):
    """A record does not follow the format, or follows a version of it that is not known here."""

    exit_code = 3


class MismatchError(KdcacheError, ValueError):
    """Two things that must fit together do not: cache and dataset, teacher and classes, pixels then and now."""

    exit_code = 3


class UnreadableSampleError(KdcacheError, OSError):
    """A sample of a dataset cannot be read: its file is empty, cut short, damaged, or may not be opened."""

    exit_code = 3


class IntegrityError(KdcacheError, OSError):
    """Stored bytes are not what the manifest says.

    Attributes:
        problems: One line per bad file, each naming the file and, for a chunk, its block.
    """

    exit_code = 3

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *problems]))
        self.problems = tuple(problems)
