"""kdcache: run the teacher once, train any number of students.

Public names are resolved when they are first used, so importing this package is quick and imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kdcache.learning.augmentations import PIPELINES as PIPELINES
    from kdcache.learning.augmentations import AugmentationListing as AugmentationListing
    from kdcache.learning.augmentations import augmentation_text as augmentation_text
    from kdcache.learning.augmentations import list_augmentations as list_augmentations
    from kdcache.learning.cache import Cache as Cache
    from kdcache.learning.losses import TAILS as TAILS
    from kdcache.learning.losses import distillation_loss as distillation_loss
    from kdcache.learning.losses import hard_label_loss as hard_label_loss
    from kdcache.learning.losses import kd_loss as kd_loss
    from kdcache.learning.models import PRESETS as PRESETS
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
    from kdcache.records.errors import UnreadableSampleError as UnreadableSampleError
    from kdcache.records.manifest import Manifest as Manifest
    from kdcache.records.manifest import Recipe as Recipe
    from kdcache.records.manifest import TeacherRecord as TeacherRecord
    from kdcache.records.manifest import ViewsRecord as ViewsRecord
    from kdcache.records.progress import Progress as Progress
    from kdcache.targets.soft_targets import SoftTargets as SoftTargets
    from kdcache.workflows.catalog import ModelListing as ModelListing
    from kdcache.workflows.catalog import list_models as list_models
    from kdcache.workflows.convert import ConvertResult as ConvertResult
    from kdcache.workflows.convert import convert as convert
    from kdcache.workflows.demo import DemoResult as DemoResult
    from kdcache.workflows.demo import demo as demo
    from kdcache.workflows.dump import DumpResult as DumpResult
    from kdcache.workflows.dump import dump as dump
    from kdcache.workflows.evaluate import Evaluation as Evaluation
    from kdcache.workflows.evaluate import evaluate as evaluate
    from kdcache.workflows.fit import FitResult as FitResult
    from kdcache.workflows.fit import fit as fit
    from kdcache.workflows.learner import TrainingOptions as TrainingOptions
    from kdcache.workflows.merge import MergeResult as MergeResult
    from kdcache.workflows.merge import merge as merge
    from kdcache.workflows.plan import PlanResult as PlanResult
    from kdcache.workflows.plan import plan as plan
    from kdcache.workflows.replay import ReplayResult as ReplayResult
    from kdcache.workflows.replay import replay as replay
    from kdcache.workflows.tradeoff import PlannedCodec as PlannedCodec
    from kdcache.workflows.train import DistillationOptions as DistillationOptions
    from kdcache.workflows.train import Student as Student
    from kdcache.workflows.train import TrainResult as TrainResult
    from kdcache.workflows.train import train as train
    from kdcache.workflows.verify import CacheInfo as CacheInfo
    from kdcache.workflows.verify import VerifyResult as VerifyResult
    from kdcache.workflows.verify import info as info
    from kdcache.workflows.verify import verify as verify

_PUBLIC = {
    "AugmentationListing": "kdcache.learning.augmentations",
    "Cache": "kdcache.learning.cache",
    "CacheBusyError": "kdcache.records.errors",
    "CacheExistsError": "kdcache.records.errors",
    "CacheInfo": "kdcache.workflows.verify",
    "CacheNotFoundError": "kdcache.records.errors",
    "CheckpointError": "kdcache.records.errors",
    "ConfigError": "kdcache.records.errors",
    "ConvertResult": "kdcache.workflows.convert",
    "DemoResult": "kdcache.workflows.demo",
    "DistillationOptions": "kdcache.workflows.train",
    "DumpResult": "kdcache.workflows.dump",
    "Evaluation": "kdcache.workflows.evaluate",
    "ExistsError": "kdcache.records.errors",
    "FitResult": "kdcache.workflows.fit",
    "FormatError": "kdcache.records.errors",
    "IncompleteCacheError": "kdcache.records.errors",
    "IntegrityError": "kdcache.records.errors",
    "KdcacheError": "kdcache.records.errors",
    "Manifest": "kdcache.records.manifest",
    "MergeResult": "kdcache.workflows.merge",
    "MismatchError": "kdcache.records.errors",
    "ModelListing": "kdcache.workflows.catalog",
    "PIPELINES": "kdcache.learning.augmentations",
    "PRESETS": "kdcache.learning.models",
    "PlanResult": "kdcache.workflows.plan",
    "PlannedCodec": "kdcache.workflows.tradeoff",
    "Progress": "kdcache.records.progress",
    "Recipe": "kdcache.records.manifest",
    "ReplayResult": "kdcache.workflows.replay",
    "SoftTargets": "kdcache.targets.soft_targets",
    "SpecError": "kdcache.records.errors",
    "Student": "kdcache.workflows.train",
    "TAILS": "kdcache.learning.losses",
    "TeacherError": "kdcache.records.errors",
    "TeacherRecord": "kdcache.records.manifest",
    "TrainResult": "kdcache.workflows.train",
    "TrainingOptions": "kdcache.workflows.learner",
    "UnreadableSampleError": "kdcache.records.errors",
    "VerifyResult": "kdcache.workflows.verify",
    "ViewsRecord": "kdcache.records.manifest",
    "augmentation_text": "kdcache.learning.augmentations",
    "convert": "kdcache.workflows.convert",
    "demo": "kdcache.workflows.demo",
    "distillation_loss": "kdcache.learning.losses",
    "dump": "kdcache.workflows.dump",
    "evaluate": "kdcache.workflows.evaluate",
    "fit": "kdcache.workflows.fit",
    "hard_label_loss": "kdcache.learning.losses",
    "info": "kdcache.workflows.verify",
    "kd_loss": "kdcache.learning.losses",
    "list_augmentations": "kdcache.learning.augmentations",
    "list_models": "kdcache.workflows.catalog",
    "merge": "kdcache.workflows.merge",
    "plan": "kdcache.workflows.plan",
    "replay": "kdcache.workflows.replay",
    "train": "kdcache.workflows.train",
    "verify": "kdcache.workflows.verify",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
