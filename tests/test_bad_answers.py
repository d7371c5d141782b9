"""A teacher that gives what cannot be stored: the dump stops and names it, and goes on when the teacher is mended."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import NUM_SAMPLES, LinearTeacher, Noise, dump_noise, tree
from torch import Tensor

from kdcache.learning.datasets import wrap_dataset
from kdcache.learning.loader import to_unit_range
from kdcache.learning.sources.source import sample_key
from kdcache.learning.views import make_views
from kdcache.records.errors import TeacherError

NUM_CLASSES = 40
CODECS = ["topk,k=4", "adaptive,mean_k=4,max_k=9", "sampled", "dense"]


def seen_image(row: int, view: int) -> Tensor:
    """What the teacher sees of one view of a sample, and of no other."""
    dataset = wrap_dataset(Noise(NUM_CLASSES))
    views = make_views("crop-flip", seed=0, image_shape=(3, 8, 8))
    key = dataset.keys[row].tobytes()
    assert key == sample_key(dataset[row][0])
    pixels = [views(dataset[row][0], key, number) for number in range(view + 1)]
    assert not any(torch.equal(pixels[view], other) for other in pixels[:view])
    return to_unit_range(pixels[view][None], torch.device("cpu"))[0]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Spoils a teacher's answer to one image; None mends it."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")

    def change(image: Tensor | None, logit: float = math.nan) -> None:
        monkeypatch.setattr(LinearTeacher, "spoilt", image)
        monkeypatch.setattr(LinearTeacher, "bad_logit", logit)

    return change


@pytest.mark.parametrize("positions", [(), (3, 2)], ids=str)
@pytest.mark.parametrize(
    ("codec", "logit"), [(CODECS[0], math.nan), (CODECS[0], math.inf), (CODECS[0], -math.inf), *((c, math.nan) for c in CODECS[1:])]
)
def test_one_bad_answer_costs_one_block(codec: str, logit: float, positions: tuple[int, ...], spoil: Any, tmp_path: Path) -> None:
    """NaN or infinity names sample, view and key, leaves nothing of its block and all of the others, which are not computed again."""
    options: dict[str, Any] = {"codec": codec, "num_classes": NUM_CLASSES, "positions": positions}
    dump_noise(tmp_path, "undisturbed", **options)
    row, view = 25, 2
    spoil(seen_image(row, view), logit)
    key = wrap_dataset(Noise(NUM_CLASSES)).keys[row].tobytes().hex()
    with pytest.raises(TeacherError, match=rf"NaN or infinity for view 2 of sample 25 \(key {key}\); nothing of this block was written"):
        dump_noise(tmp_path, **options)
    root = tmp_path / "cache"
    marks = [json.loads(path.read_bytes()) for path in sorted((root / ".dump" / "blocks").glob("*.json"))]
    assert [(mark["block"]["samples"], mark["block"]["views"]) for mark in marks] == [([0, 17], [0, 4]), ([0, 17], [4, 5])]
    listed = {file["path"] for mark in marks for file in mark["files"]}
    assert {path for path in tree(root) if not path.startswith(".dump/")} == listed
    written = {path: (root / path).stat().st_mtime_ns for path in listed}
    spoil(None)
    assert dump_noise(tmp_path, **options).blocks_computed == 4
    assert {path: (root / path).stat().st_mtime_ns for path in listed} == written
    assert tree(root) == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("codec", CODECS)
def test_a_bad_first_answer_leaves_nothing(codec: str, spoil: Any, tmp_path: Path) -> None:
    """A teacher that fails on what a dump looks at before it begins leaves no folder behind, and the sample is named."""
    spoil(seen_image(0, 0))
    with pytest.raises(TeacherError, match="view 0 of sample 0 "):
        dump_noise(tmp_path, codec=codec, num_classes=NUM_CLASSES)
    assert not (tmp_path / "cache").exists()


def test_what_is_measured_must_be_finite(spoil: Any, tmp_path: Path) -> None:
    """A codec that measures the teacher first meets a bad answer then: the sample is named, and nothing was begun."""
    spoil(seen_image(NUM_SAMPLES - 1, 0))
    with pytest.raises(TeacherError, match=f"view 0 of sample {NUM_SAMPLES - 1} "):
        dump_noise(tmp_path, codec="adaptive,mean_k=4,max_k=9", num_classes=NUM_CLASSES)
    assert not (tmp_path / "cache").exists()
