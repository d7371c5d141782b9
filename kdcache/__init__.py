"""kdcache: run the teacher once, train any number of students.

Public names are resolved when they are first used, so importing this package is quick and imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kdcache.records.errors import CacheBusyError as CacheBusyError
    from kdcache.records.errors import CacheExistsError as CacheExistsError
    from kdcache.records.errors import CacheNotFoundError as CacheNotFoundError
    from kdcache.records.errors import CheckpointError as CheckpointError
    from kdcache.records.errors import ConfigError as ConfigError
    from kdcache.records.errors import ExistsError as ExistsError
    from kdcache.records.errors import FormatError as FormatError
    from kdcache.records.errors import IncompleteCacheError as IncompleteCacheError
    from kdcache.records.errors import IntegrityError as IntegrityError
    from kdcache.records.errors import KdcacheError as KdcacheError
    from kdcache.records.errors import MismatchError as MismatchError
    from kdcache.records.errors import SpecError as SpecError
    from kdcache.records.errors import TeacherError as TeacherError
    from kdcache.workflows.fit import FitResult as FitResult
    from kdcache.workflows.fit import fit as fit
    from kdcache.workflows.learner import TrainingOptions as TrainingOptions

_PUBLIC = {
    "CacheBusyError": "kdcache.records.errors",
    "CacheExistsError": "kdcache.records.errors",
    "CacheNotFoundError": "kdcache.records.errors",
    "CheckpointError": "kdcache.records.errors",
    "ConfigError": "kdcache.records.errors",
    "ExistsError": "kdcache.records.errors",
    "FormatError": "kdcache.records.errors",
    "IncompleteCacheError": "kdcache.records.errors",
    "IntegrityError": "kdcache.records.errors",
    "KdcacheError": "kdcache.records.errors",
    "MismatchError": "kdcache.records.errors",
    "SpecError": "kdcache.records.errors",
    "TeacherError": "kdcache.records.errors",
    "FitResult": "kdcache.workflows.fit",
    "TrainingOptions": "kdcache.workflows.learner",
    "fit": "kdcache.workflows.fit",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
