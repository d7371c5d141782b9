"""Networks and model files: what is built, what is saved, and what is refused."""

import contextlib
import os
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kdcache.learning.checkpoints import LoadedModel, load_model, network_state, save_model, tensors_digest
from kdcache.learning.models import PRESETS, build_model, resolve_model_spec
from kdcache.records.errors import CheckpointError, KdcacheError, MismatchError, SpecError
from kdcache.records.specs import Spec

TINY = Spec.parse("tiny,channels=1,image_size=8,num_classes=4")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network whose weights and running statistics are not those of any other."""
    torch.manual_seed(3)
    model = build_model(TINY, trusted=True)
    for _ in range(3):
        model(torch.rand(16, 1, 8, 8))
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """A batch for the small network."""
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def loaded(path: Path, *, arch: Spec | None = None, num_classes: int = 4) -> LoadedModel:
    """A model file, read for grey images of 8 by 8."""
    return load_model(path, num_classes=num_classes, image_shape=(1, 8, 8), arch=arch)


def num_parameters(model: nn.Module) -> int:
    """Trainable numbers of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 5, 8, 28, 32, 64, 224])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_any_image(preset: str, size: int, channels: int) -> None:
    """Every preset gives finite logits for grey and colour images of any size, whether square or not."""
    spec = resolve_model_spec(Spec.parse(preset), num_classes=7, image_shape=(channels, size, size))
    model = build_model(spec, trusted=True).eval()
    with torch.inference_mode():
        logits = model(torch.rand(2, channels, size, max(1, size - 3)))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_presets_grow() -> None:
    """The presets stand in the order of their size, each at least twice the one before."""
    counts = [num_parameters(build_model(Spec.parse(f"{name},channels=3,image_size=32,num_classes=10"), trusted=True)) for name in PRESETS]
    assert all(later > 2 * earlier for earlier, later in pairwise(counts))


def test_specs_are_resolved_from_the_dataset() -> None:
    """What a spec leaves out is filled in from the dataset; what it says stays."""
    shape = (3, 20, 24)
    assert str(resolve_model_spec(Spec.parse("small"), num_classes=5, image_shape=shape)) == "small,channels=3,image_size=24,num_classes=5"
    found = resolve_model_spec(Spec.parse("small,image_size=64"), num_classes=5, image_shape=shape)
    assert str(found) == "small,channels=3,image_size=64,num_classes=5"
    found = resolve_model_spec(Spec.parse("torchvision:resnet18"), num_classes=5, image_shape=shape)
    assert str(found) == "torchvision:resnet18,num_classes=5"
    assert str(resolve_model_spec(Spec.parse("py:mine:make"), num_classes=5, image_shape=shape)) == "py:mine:make"


def test_torchvision_network_takes_grey_images() -> None:
    """A torchvision network is built with its class count, takes grey images as colour ones, and keeps its own state names."""
    model = build_model(Spec.parse("torchvision:resnet18,num_classes=6"), trusted=True).eval()
    grey = torch.rand(2, 1, 32, 32)
    with torch.inference_mode():
        logits = model(grey)
        assert torch.equal(logits, model(grey.expand(-1, 3, -1, -1)))
    assert logits.shape == (2, 6)
    assert network_state(model).keys() >= {"conv1.weight", "layer4.1.bn2.running_var", "fc.bias"}


def test_normalisation_belongs_to_the_network() -> None:
    """Images in [0, 1] go in; the network normalises them by what its spec says, which is no part of its weights."""
    builds = {
        norm: build_model(Spec.parse(f"tiny,channels=3,image_size=8,num_classes=4,norm={norm}"), trusted=True).eval()
        for norm in ("none", "half", "imagenet")
    }
    for model in builds.values():
        model.body.load_state_dict(builds["none"].body.state_dict())  # type: ignore[union-attr]
    x = torch.rand(3, 3, 8, 8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        assert torch.allclose(builds["half"](x), builds["none"]((x - 0.5) / 0.25), atol=1e-6)
        assert torch.allclose(builds["imagenet"](x), builds["none"]((x - mean[:, None, None]) / std[:, None, None]), atol=1e-5)
    assert len({tuple(network_state(model)) for model in builds.values()}) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("huge,num_classes=3", "unknown model 'huge,num_classes=3'; expected one of: tiny, small, medium, large, torchvision:NAME"),
        ("hub:vit", "unknown model 'hub:vit'"),
        ("torchvision:resnet19", "Unknown model resnet19; `kdcache models --all` lists the names"),
        ("torchvision:resnet18,widht=3", "unexpected keyword argument 'widht'"),
        ("tiny,channels=1,image_size=8", "expected num_classes to be a positive whole number, found None"),
        ("tiny,channels=0,image_size=8,num_classes=3", "expected channels to be a positive whole number, found 0"),
        ("tiny,channels=1,image_size=8.0,num_classes=3", "expected image_size to be a positive whole number, found 8.0"),
        ("tiny,channels=1,image_size=8,num_classes=True", "expected num_classes to be a positive whole number, found True"),
        ("tiny,channels=1,image_size=8,num_classes=3,width=2", "unknown option width"),
        ("tiny,channels=1,image_size=8,num_classes=3,norm=zscore", "unknown norm 'zscore'; expected one of: half, imagenet, none"),
        ("tiny,channels=1,image_size=8,num_classes=3,norm=imagenet", "norm=imagenet is for 3 channels, the network takes 1"),
        ("py:nowhere:make", "No module named 'nowhere'"),
        ("py:builtins", "expected py:MODULE:FUNCTION"),
        ("py:builtins:dict", "expected the function to return a torch.nn.Module, found dict"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    """A network that does not exist, or options that it does not take, are a SpecError that says what was expected."""
    with pytest.raises(SpecError, match=re.escape(message)):
        build_model(Spec.parse(spec), trusted=True)


def test_code_is_run_for_the_user_only(tmp_path: Path) -> None:
    """A `py:` network that a file names is refused with the flag that allows it; one that was typed is built."""
    spec = Spec.parse("py:torch.nn:Linear,in_features=2,out_features=3")
    assert isinstance(build_model(spec, trusted=True), nn.Linear)
    with pytest.raises(SpecError, match=re.escape("type it yourself: --arch py:torch.nn:Linear")):
        build_model(spec, trusted=False)
    save_model(tmp_path / "m.safetensors", nn.Linear(2, 3), spec=spec, metadata={})
    with pytest.raises(SpecError, match="read from a file and would run code"):
        loaded(tmp_path / "m.safetensors")
    assert isinstance(loaded(tmp_path / "m.safetensors", arch=spec).model, nn.Linear)


def test_safetensors_round_trip(network: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """A saved network comes back with its architecture, its metadata and the very same outputs, in eval mode."""
    save_model(tmp_path / "m.safetensors", network, spec=TINY, metadata={"recipe_key": "sha256:aa"})
    found = loaded(tmp_path / "m.safetensors")
    with torch.inference_mode():
        assert torch.equal(found.model(images), network(images))
    assert not found.model.training
    assert found.spec == TINY
    assert found.metadata == {"recipe_key": "sha256:aa", "arch": str(TINY)}
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_state_dict_needs_an_architecture(network: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """A bare `.pt` state dict is refused with the flag that mends it, and loads when the architecture is given."""
    torch.save(network_state(network), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=re.escape("does not say of which network; add --arch SPEC")):
        loaded(tmp_path / "m.pt")
    found = loaded(tmp_path / "m.pt", arch=Spec.parse("tiny"))
    assert found.spec == TINY
    with torch.inference_mode():
        assert torch.equal(found.model(images), network(images))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_state_dict_that_names_its_architecture(suffix: str, network: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """A file of {"arch", "state_dict"} needs nothing else; what the user types overrules it."""
    path = tmp_path / f"m{suffix}"
    torch.save({"arch": "tiny", "state_dict": network.body.state_dict()}, path)  # type: ignore[union-attr]
    with torch.inference_mode():
        assert torch.equal(loaded(path).model(images), network(images))
    with pytest.raises(CheckpointError, match="do not fit the architecture small"):
        loaded(path, arch=Spec.parse("small"))


def test_wrong_architecture_lists_what_differs(network: nn.Module, tmp_path: Path) -> None:
    """Weights of another network are refused with the names that are missing, left over or of another shape, and the flag."""
    torch.save(network_state(network), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=re.escape("give the right one with --arch SPEC")) as caught:
        loaded(tmp_path / "m.pt", arch=Spec.parse("torchvision:resnet18"))
    assert re.search(r"missing \(122\): conv1\.weight, .* and 119 more", str(caught.value))
    assert re.search(r"unexpected \(\d+\): stem\.0\.weight", str(caught.value))
    with pytest.raises(CheckpointError, match=re.escape("stem.0.weight: file [8, 1, 3, 3], network [16, 1, 3, 3]")) as caught:
        loaded(tmp_path / "m.pt", arch=Spec.parse("small"))
    assert "missing" not in str(caught.value)


def test_another_class_count_is_a_mismatch(network: nn.Module, tmp_path: Path) -> None:
    """A network for other classes than the dataset's is a MismatchError that shows both counts."""
    save_model(tmp_path / "m.safetensors", network, spec=TINY, metadata={})
    with pytest.raises(MismatchError, match="tells 4 classes apart, the dataset has 10"):
        loaded(tmp_path / "m.safetensors", num_classes=10)


def test_other_channels_are_a_mismatch(network: nn.Module, tmp_path: Path) -> None:
    """A network for grey images is refused for colour images when it is loaded, not in the middle of a run."""
    save_model(tmp_path / "m.safetensors", network, spec=TINY, metadata={})
    with pytest.raises(KdcacheError, match="channel"):
        load_model(tmp_path / "m.safetensors", num_classes=4, image_shape=(3, 8, 8))


def test_digest_is_the_same_from_every_file(network: nn.Module, tmp_path: Path) -> None:
    """The digest over the tensors does not know the file's kind, nor the order or memory layout of the tensors."""
    state = network_state(network)
    save_model(tmp_path / "m.safetensors", network, spec=TINY, metadata={})
    torch.save(dict(reversed(state.items())), tmp_path / "m.pt")
    torch.save({"arch": "tiny", "state_dict": {name: value.T.contiguous().T if value.ndim == 2 else value for name, value in state.items()}},
               tmp_path / "n.pt")  # fmt: skip
    found = {loaded(tmp_path / name, arch=TINY).sha256 for name in ("m.safetensors", "m.pt", "n.pt")}
    assert found == {tensors_digest(state)}
    assert next(iter(found)).startswith("sha256:")


def test_digest_knows_every_part_of_a_tensor() -> None:
    """Another value, name, type or shape gives another digest, for every type that a checkpoint may hold."""
    base = torch.arange(6, dtype=torch.float32)
    states = [
        {"a": base}, {"b": base}, {"a": base + 1e-6}, {"a": base.reshape(2, 3)}, {"a": base.double()}, {"a": base.half()}, {"a": base.bfloat16()},
        {"a": base.bool()}, {"a": base.int()}, {"a": base.view(torch.int32)}, {"a": base[:0]}, {"a": base[1]}, {"a": base, "b": base}, {},
    ]  # fmt: skip
    assert len({tensors_digest(state) for state in states}) == len(states)


class Hostile:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(suffix: str, zipped: bool, network: nn.Module, tmp_path: Path) -> None:
    """A file whose pickle would run code is a CheckpointError that says why and how to save it, and nothing is run."""
    path, made = tmp_path / f"m{suffix}", tmp_path / "made"
    torch.save({"arch": "tiny", "state_dict": network_state(network), "x": Hostile(made)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=re.escape("could run code, so it is refused. Save the weights alone")):
        loaded(path, arch=TINY)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists(), "the file is harmless: it proves nothing"


def test_a_whole_pickled_module_is_refused(network: nn.Module, tmp_path: Path) -> None:
    """A module that was pickled whole is refused like any other pickle of code."""
    torch.save(network, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        loaded(tmp_path / "m.pt", arch=TINY)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "old.pt"])
def test_a_file_that_is_cut_short_is_refused(name: str, share: float, network: nn.Module, tmp_path: Path) -> None:
    """A model file that is cut short anywhere is a CheckpointError that names it."""
    path = tmp_path / name
    if name == "m.safetensors":
        save_model(path, network, spec=TINY, metadata={})
    else:
        torch.save(network_state(network), path, _use_new_zipfile_serialization=name == "m.pt")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        loaded(path, arch=TINY)


@pytest.mark.parametrize(
    "content",
    [b"hello world, this is no model", b"\x80\x02", b"\x00" * 100, b"<html></html>", bytes(range(256))],
    ids=["text", "pickle", "zeros", "html", "bytes"],
)
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_a_file_of_something_else_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    """A file that was never a model is a CheckpointError that does not accuse it of running code."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        loaded(path, arch=TINY)
    assert "neither safetensors" in str(caught.value) or "not a readable safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"a": 3}, [torch.zeros(1)], torch.zeros(1), {"state_dict": {"a": 3}}, {"state_dict": {}}])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    """A PyTorch file that holds something else than named tensors is a CheckpointError that says what was expected."""
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="expected a state dict or"):
        loaded(tmp_path / "m.pt", arch=TINY)


def test_a_missing_file_says_what_would_make_it(tmp_path: Path) -> None:
    """No file, or a folder in its place, is a CheckpointError with the command that makes one."""
    for path in (tmp_path / "m.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=re.escape(f"no model file at {path}; `kdcache fit --out")):
            loaded(path)


def test_foreign_safetensors_load_with_an_architecture(network: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """A safetensors file without metadata, as other tools write it, loads when the architecture is given."""
    safetensors.torch.save_file(network_state(network), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="does not say of which network"):
        loaded(tmp_path / "m.safetensors")
    with torch.inference_mode():
        assert torch.equal(loaded(tmp_path / "m.safetensors", arch=TINY).model(images), network(images))


def test_a_damaged_file_is_refused_or_loads(network: nn.Module, tmp_path: Path) -> None:
    """Whatever byte at the start of a `.pt` is damaged, the file loads or is refused by one of kdcache's own errors."""
    path = tmp_path / "m.pt"
    torch.save(network_state(network), path)
    whole = path.read_bytes()
    generator = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[generator.randrange(3000)] = generator.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(KdcacheError):
            loaded(path, arch=TINY)


def test_a_file_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that names published weights brings its own: loading it touches no network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked for a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = build_model(Spec.parse("torchvision:resnet18,num_classes=1000"), trusted=True)
    spec = Spec.parse("torchvision:resnet18,num_classes=1000,weights=IMAGENET1K_V1")
    save_model(tmp_path / "m.safetensors", model, spec=spec, metadata={})
    found = load_model(tmp_path / "m.safetensors", num_classes=1000, image_shape=(3, 8, 8))
    assert found.sha256 == tensors_digest(network_state(model))
