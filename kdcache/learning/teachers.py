"""Teachers: a model file, a function of one's own, or several of these whose answers are averaged."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kdcache.learning.checkpoints import LoadedModel, load_model, network_state, tensors_digest
from kdcache.learning.exported import load_exported
from kdcache.learning.models import build_model, load_python_object, resolve_model_spec
from kdcache.learning.onnx_programs import load_onnx
from kdcache.records.errors import CheckpointError, ConfigError, MismatchError, SpecError, TeacherError
from kdcache.records.hashing import canonical_json, sha256
from kdcache.records.jsonrecord import to_json
from kdcache.records.manifest import MemberRecord
from kdcache.records.specs import Spec

Ensemble = Literal["logits", "probabilities"]
ENSEMBLES: tuple[Ensemble, ...] = get_args(Ensemble)
Source = str | Path
"""A model file, or a spec that brings its weights: `py:MODULE:FUNCTION`, `torchvision:NAME,weights=…`, `timm:NAME,weights=…`."""
SPEC_SOURCES = ("py", "torchvision", "timm")
VERSION = "version"
"""The option of a `py:` teacher that stands for the weights of one that has none to hash."""


class CallableModel(nn.Module):
    """A function from images to logits, where a module is expected."""

    def __init__(self, function: Callable[[Tensor], object], spec: Spec) -> None:
        super().__init__()
        self.function, self.spec = function, spec

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to logits."""
        logits = self.function(images)
        if not isinstance(logits, Tensor):
            raise TeacherError(f"{self.spec}: expected the function to give logits as a torch.Tensor, found {type(logits).__name__}")
        return logits


class EnsembleModel(nn.Module):
    """Several teachers as one.

    Args:
        members: Images in [0, 1] to logits, all of one shape.
        names: What they are called in messages.
        ensemble: `logits`: the mean of the logits; `probabilities`: the logarithm of the mean of softmax(logits), at T = 1.
    """

    def __init__(self, members: Sequence[nn.Module], *, names: Sequence[str], ensemble: Ensemble) -> None:
        super().__init__()
        self.members, self.names, self.ensemble = nn.ModuleList(members), tuple(names), ensemble

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to logits, in float32."""
        answers = [member(images).float() for member in self.members]
        if len({answer.shape for answer in answers}) > 1:
            shapes = ", ".join(f"{name}: {list(answer.shape)}" for name, answer in zip(self.names, answers, strict=True))
            raise TeacherError(f"teachers that are averaged must give logits of one shape, found {shapes}")
        if self.ensemble == "logits":
            return torch.stack(answers).mean(dim=0)
        return torch.stack([answer.log_softmax(dim=-1) for answer in answers]).logsumexp(dim=0) - math.log(len(answers))


def load_teachers(
    teachers: Source | Sequence[Source],
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    archs: Sequence[str] = (),
    ensemble: Ensemble = "logits",
) -> LoadedModel:
    """One teacher, or several as one.

    The order of several does not matter: they are averaged in the order of their digests.

    Args:
        teachers: One or several; see `load_teacher`.
        num_classes: Classes of the dataset.
        image_shape: Shape of one view: channels, height and width of images.
        archs: Architectures where files do not say them: none, one for all, or one for each teacher.
        ensemble: What of several is averaged.

    Raises:
        ConfigError: No teacher, the same one twice, another number of architectures, or no such average.
        CheckpointError: A teacher cannot be loaded.
        MismatchError: A teacher has another number of classes than the dataset.
        SpecError: A spec cannot be understood.
    """
    sources = as_list(teachers)
    if not sources:
        raise ConfigError("expected a teacher, found none: --teacher FILE")
    if ensemble not in ENSEMBLES:
        raise ConfigError(f"unknown --ensemble {ensemble!r}; expected one of: {', '.join(ENSEMBLES)}")
    if len(archs) not in (0, 1, len(sources)):
        raise ConfigError(f"expected no --arch, one for all or {len(sources)}, one for each --teacher in their order, found {len(archs)}")
    specs = [Spec.parse(archs[i % len(archs)]) if archs else None for i in range(len(sources))]
    loaded = [
        load_teacher(source, num_classes=num_classes, image_shape=image_shape, arch=spec)
        for source, spec in zip(sources, specs, strict=True)
    ]
    return loaded[0] if len(loaded) == 1 else _averaged(loaded, ensemble)


def as_list(teachers: Source | Sequence[Source]) -> list[Source]:
    """One teacher or several, as a list."""
    return [teachers] if isinstance(teachers, str | Path) else list(teachers)


def load_teacher(teacher: Source, *, num_classes: int, image_shape: tuple[int, ...], arch: Spec | None = None) -> LoadedModel:
    """A teacher that the user named, in eval mode. Never executes anything from a file.

    Args:
        teacher: A file: `.safetensors` or `.pt` as in `load_model`, a `.pt2` of torch.export, an `.onnx`. Or a spec that brings its
            weights: `torchvision:NAME,weights=…`, or `py:MODULE:FUNCTION` whose function returns a module, or any callable from
            images in [0, 1], [batch, channels, height, width], to logits.
        num_classes: Classes of the dataset.
        image_shape: Shape of one view: channels, height and width of images.
        arch: The architecture, where a file does not say it.

    Raises:
        CheckpointError: The file cannot be loaded.
        MismatchError: The teacher has another number of classes than the dataset.
        SpecError: The spec cannot be understood, or brings no weights.
    """
    spec = None if Path(teacher).exists() else Spec.parse(str(teacher)) if str(teacher).startswith(_PREFIXES) else None
    if spec is None:
        return _load_file(Path(teacher), num_classes=num_classes, image_shape=image_shape, arch=arch)
    if arch is not None:
        raise SpecError(f"--teacher {spec} says itself which network it is; expected no --arch for it, found {arch}")
    if spec.source == "py":
        return _load_python(spec)
    return _load_published(spec, num_classes=num_classes, image_shape=image_shape)


def _load_file(path: Path, *, num_classes: int, image_shape: tuple[int, ...], arch: Spec | None) -> LoadedModel:
    loaders = {".pt2": load_exported, ".onnx": load_onnx}
    load = loaders.get(path.suffix.lower(), load_model) if path.is_file() else load_model
    return load(path, num_classes=num_classes, image_shape=image_shape, arch=arch)


_PREFIXES = tuple(f"{source}:" for source in SPEC_SOURCES)


def _load_python(spec: Spec) -> LoadedModel:
    made = load_python_object(spec.without_options(VERSION), trusted=True, option="--teacher")
    if not callable(made):
        raise SpecError(f"{spec}: expected the function to return a torch.nn.Module or a callable, found {type(made).__name__}")
    state = made.state_dict() if isinstance(made, nn.Module) else {}
    if not state and VERSION not in spec.options:
        raise SpecError(
            f"{spec} has no weights that could tell it from another teacher; name what it is with an option of your own choice, and"
            f" change that whenever its answers change: --teacher {spec.with_options(version='NAME')}"
        )
    model = _own_copy(made) if isinstance(made, nn.Module) else CallableModel(made, spec)
    digest = tensors_digest(state) if state else sha256(str(spec).encode())
    return LoadedModel(model=model.eval(), spec=spec, sha256=digest, metadata={})


def _own_copy(model: nn.Module) -> nn.Module:
    """A copy to put into eval mode and onto a device, so that the caller's own stays as it is; itself where it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError):
        return model


def _load_published(spec: Spec, *, num_classes: int, image_shape: tuple[int, ...]) -> LoadedModel:
    """A network with the weights that its library publishes; the recipe is that of the same weights from a file."""
    if not spec.options.get("weights"):
        raise CheckpointError(
            f"--teacher {spec} would have random weights; expected --teacher {spec.with_options(weights='DEFAULT')}, which its library"
            f" downloads, or a file: --teacher FILE --arch {spec}"
        )
    resolved = resolve_model_spec(spec, num_classes=num_classes, image_shape=image_shape)
    if resolved.options["num_classes"] != num_classes:
        raise MismatchError(f"{spec} tells {resolved.options['num_classes']} classes apart, the dataset has {num_classes}")
    model = build_model(resolved, trusted=True)
    digest = tensors_digest(network_state(model))
    return LoadedModel(model=model.eval(), spec=resolved.without_options("weights"), sha256=digest, metadata={})


def _averaged(loaded: Sequence[LoadedModel], ensemble: Ensemble) -> LoadedModel:
    ordered = sorted(loaded, key=lambda member: (member.sha256, str(member.spec)))
    members = tuple(MemberRecord(spec=str(member.spec), sha256=member.sha256) for member in ordered)
    if len(set(members)) < len(members):
        twice = next(str(member.spec) for member in members if members.count(member) > 1)
        raise ConfigError(f"the same teacher is given twice: {twice}; an average has it once")
    return LoadedModel(
        model=EnsembleModel([member.model for member in ordered], names=[member.spec for member in members], ensemble=ensemble).eval(),
        spec=Spec(source="", name="ensemble"),
        sha256=sha256(canonical_json(to_json(members))),
        metadata={},
        float32_only=any(member.float32_only for member in ordered),
        members=members,
        ensemble=ensemble,
    )
