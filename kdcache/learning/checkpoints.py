"""Model files: safetensors with the architecture in the metadata, or a `.pt` that holds tensors and nothing else."""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kdcache.learning.models import InputEnd, build_model, resolve_model_spec
from kdcache.records.errors import CheckpointError, MismatchError
from kdcache.records.manifest import MemberRecord
from kdcache.records.specs import Spec
from kdcache.store.files import write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A network with its weights, and what identifies it."""

    model: nn.Module
    """In eval mode, on the CPU."""

    spec: Spec
    """The architecture, resolved."""

    sha256: str
    """Digest over the tensors by name, see `tensors_digest`; of a `.pt2` or an `.onnx` over the file's bytes."""

    metadata: dict[str, str]
    """What the file says of itself."""

    float32_only: bool = False
    """Whether it brings an arithmetic of its own, so that no other can be asked for."""

    members: tuple[MemberRecord, ...] = ()
    """Of several teachers, which; empty for one."""

    ensemble: str = ""
    """What of several teachers is averaged; empty for one."""


def tensors_digest(state: dict[str, Tensor]) -> str:
    """sha256 over the tensors in the order of their names: name, dtype, shape and little-endian bytes of each.

    The digest is the same whether the tensors came from safetensors or from a `.pt`.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def network_state(model: nn.Module) -> dict[str, Tensor]:
    """The network's tensors by their own names, without kdcache's input end around it."""
    body = model.body if isinstance(model, InputEnd) else model
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in body.state_dict().items()}


def save_model(path: Path, model: nn.Module, *, spec: Spec, metadata: dict[str, str]) -> None:
    """Writes a network atomically as safetensors.

    Args:
        path: The `.safetensors` file.
        model: The network.
        spec: Its resolved architecture, recorded under `arch`.
        metadata: More to record; values are strings.
    """
    write_atomically(path, save(network_state(model), metadata={**metadata, "arch": str(spec)}))


def read_metadata(path: Path) -> dict[str, str]:
    """What a `.safetensors` file says of itself; reads the header only.

    Raises:
        CheckpointError: It is not readable.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def load_model(path: Path, *, num_classes: int, image_shape: tuple[int, ...], arch: Spec | None = None) -> LoadedModel:
    """Reads a model file and builds its network. Never executes anything from the file.

    Args:
        path: `.safetensors`, or `.pt`/`.pth` holding a state dict or `{"arch": …, "state_dict": …}`.
        num_classes: Classes of the dataset that the network will see.
        image_shape: Shape of one view: channels, height and width of images.
        arch: The architecture, where the file does not say it, or to overrule the file.

    Raises:
        CheckpointError: No such file, not a model file, a pickle that would run code, no architecture, or weights that
            do not fit the architecture (the first differing names are listed).
        MismatchError: The network has another number of classes than the dataset.
    """
    if not path.is_file():
        raise CheckpointError(f"no model file at {path}; `kdcache fit --out {path}` would make one")
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if arch is None and "arch" not in metadata:
        raise CheckpointError(
            f"{path} holds weights but does not say of which network; add --arch SPEC, such as --arch torchvision:resnet18"
        )
    spec = (arch if arch is not None else Spec.parse(metadata["arch"])).without_options("weights")  # they come from the file
    _check_fits(path, spec, num_classes, channels=image_shape[0])
    spec = resolve_model_spec(spec, num_classes=num_classes, image_shape=image_shape)
    model = build_model(spec, trusted=arch is not None)
    _load_state(path, model, state, spec)
    return LoadedModel(model=model.eval(), spec=spec, sha256=tensors_digest(state), metadata=metadata)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    metadata = read_metadata(path)
    try:
        return load_file(path), metadata
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        if file.read(2)[:1] not in (b"P", b"\x80"):  # a zip archive, or a bare pickle
            raise CheckpointError(f"{path} is neither safetensors nor a PyTorch file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's reader raises almost anything on damaged bytes
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise CheckpointError(
                f"{path} is a pickle that holds more than tensors, and loading it could run code, so it is refused. Save the"
                " weights alone: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file(model.state_dict(), FILE)"
            ) from error
        raise CheckpointError(f"{path} is neither safetensors nor a PyTorch file, or it is damaged or cut short: {error}") from error
    metadata = {}
    if isinstance(content, dict) and "state_dict" in content:
        if isinstance(content.get("arch"), str):
            metadata["arch"] = content["arch"]
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(item, Tensor) for item in content.values()):
        raise CheckpointError(
            f"{path}: expected a state dict or {{'arch': SPEC, 'state_dict': …}}, found {type(content).__name__} without tensors"
        )
    return {str(name): tensor for name, tensor in content.items()}, metadata


def _check_fits(path: Path, spec: Spec, num_classes: int, *, channels: int) -> None:
    """What the architecture says of itself fits the dataset: classes, and channels (grey feeds a colour network)."""
    found = spec.options.get("num_classes", num_classes)
    if found != num_classes:
        raise MismatchError(f"{path} tells {found} classes apart, the dataset has {num_classes}; choose one that fits the other")
    wanted = spec.options.get("channels", channels)
    if wanted != channels and channels != 1:
        raise MismatchError(f"{path} takes images of {wanted} channels, the dataset has {channels}; choose one that fits the other")


def _load_state(path: Path, model: nn.Module, state: dict[str, Tensor], spec: Spec) -> None:
    body = model.body if isinstance(model, InputEnd) else model
    expected = body.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name}: file {list(state[name].shape)}, network {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if missing or unexpected or wrong:
        lines = [f"the weights in {path} do not fit the architecture {spec}; give the right one with --arch SPEC"]
        for title, names in (("missing", missing), ("unexpected", unexpected), ("other shape", wrong)):
            if names:
                more = f" … and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"{title} ({len(names)}): {', '.join(names[:3])}{more}")
        raise CheckpointError("\n  ".join(lines))
    body.load_state_dict(state)
