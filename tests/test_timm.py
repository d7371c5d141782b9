"""timm's networks: built by name, normalised as timm says, and refused clearly where timm is missing."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcache.learning.checkpoints import load_model, network_state, tensors_digest
from kdcache.learning.models import build_model, resolve_model_spec
from kdcache.learning.teachers import load_teacher
from kdcache.records.errors import CheckpointError, SpecError
from kdcache.records.specs import Spec

timm = pytest.importorskip("timm", reason="pip install 'kdcache[timm]'")
NAME = "timm:test_resnet.r160_in1k"
"""timm's own test network: a third of a million numbers, with a mean and a deviation that are not ImageNet's."""


def test_a_timm_network_is_normalised_as_timm_says() -> None:
    """Images in [0, 1] are normalised by the published mean and deviation, or by those of `norm`; state names are timm's own."""
    spec = resolve_model_spec(Spec.parse(NAME), num_classes=7, image_shape=(3, 32, 32))
    assert str(spec) == f"{NAME},num_classes=7"
    model = build_model(spec, trusted=True).eval()
    body = model.body
    assert isinstance(body, nn.Module)
    images = torch.rand(2, 3, 32, 32)
    published = body.pretrained_cfg
    mean, std = (torch.tensor(published[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        assert torch.allclose(model(images), body((images - mean) / std), atol=1e-5)
        other = build_model(spec.with_options(norm="none"), trusted=True).eval()
        other.body.load_state_dict(body.state_dict())  # type: ignore[union-attr]
        assert torch.allclose(other(images), body(images), atol=1e-5)
    assert network_state(model).keys() == body.state_dict().keys()


def test_a_timm_teacher_from_a_file(tmp_path: Path) -> None:
    """A state dict of a timm network is a teacher with `--arch timm:NAME`, as with any other architecture."""
    path = tmp_path / "m.pt"
    model = timm.create_model("test_resnet", num_classes=7)
    torch.save(model.state_dict(), path)
    found = load_model(path, num_classes=7, image_shape=(3, 32, 32), arch=Spec.parse(NAME))
    assert found.sha256 == tensors_digest(model.state_dict())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet19", "Unknown model (resnet19); timm.list_models() lists the names"),
        (f"{NAME},widht=3", "unexpected keyword argument 'widht'"),
        (f"{NAME},norm=zscore", "unknown norm 'zscore'; expected one of: half, imagenet, none"),
        (f"{NAME},in_chans=1", "is for 3 channels, the network takes 1; expected norm=none or half"),
    ],
)
def test_bad_timm_specs_are_refused(spec: str, message: str) -> None:
    """A timm network that does not exist, or options that it does not take, are a SpecError that says what was expected."""
    with pytest.raises(SpecError, match=re.escape(message)):
        build_model(Spec.parse(spec), trusted=True)


def test_weights_are_fetched_for_the_asking_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm teacher by spec needs `weights`; only then is anything asked of a network, and the recipe does not name it."""
    with pytest.raises(CheckpointError, match=re.escape(f"expected --teacher {NAME},weights=DEFAULT")):
        load_teacher(NAME, num_classes=1000, image_shape=(3, 160, 160))
    asked = []

    def fetched(_model_name: str, *, pretrained: bool = False, **options: object) -> nn.Module:
        asked.append((_model_name, pretrained))
        model: nn.Module = created(_model_name, pretrained=False, **options)
        return model

    created = timm.create_model
    monkeypatch.setattr(timm, "create_model", fetched)
    found = load_teacher(f"{NAME},weights=DEFAULT", num_classes=1000, image_shape=(3, 160, 160))
    assert asked == [("test_resnet.r160_in1k", True)]
    assert str(found.spec) == f"{NAME},num_classes=1000"
    assert found.sha256 == tensors_digest(network_state(found.model))


def test_a_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm, the error says what to install."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SpecError, match=re.escape("needs timm: pip install 'kdcache[timm]'")):
        build_model(Spec.parse(NAME), trusted=True)
