"""What students see of a cache: every view there is, views at another size, mixed views, several views of one decoded image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import kdcache, kdcache_json
from images_on_disk import encoded, picture
from stored import LinearTeacher, Noise, dump_noise, signed
from torch import nn
from torch.nn.utils import parameters_to_vector

from kdcache.learning.cache import Cache, Joined
from kdcache.learning.checkpoints import load_model
from kdcache.learning.datasets import wrap_dataset
from kdcache.learning.losses import distillation_loss
from kdcache.learning.samples import EvaluationEnd
from kdcache.records.errors import ConfigError, MismatchError, SpecError
from kdcache.records.manifest import MANIFEST_NAME
from kdcache.records.specs import Spec
from kdcache.targets.soft_targets import SoftTargets

NUM_CLASSES = 5
FLIPS = """
[[ops]]
op = "RandomHorizontalFlip"
p = 0.5

[[ops]]
op = "RandomVerticalFlip"
p = 0.2
"""


def join_noise(path: Path) -> Joined:
    """A cache of noise with the samples that it was made of."""
    return Cache(path).join(wrap_dataset(Noise(NUM_CLASSES), num_classes=NUM_CLASSES))


def teacher_of(folder: Path) -> nn.Module:
    """The teacher that `dump_noise` made."""
    arch = Spec.parse(f"py:stored:LinearTeacher,num_classes={NUM_CLASSES},positions=()")
    return load_model(folder / f"teacher-{NUM_CLASSES}-.safetensors", num_classes=NUM_CLASSES, image_shape=(3, 8, 8), arch=arch).model


def test_a_cache_of_all_views_is_the_online_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same batches, a student from the cache and one beside the live teacher have the same losses and weights, to rounding."""
    monkeypatch.chdir(tmp_path)
    Path("flips.toml").write_text(FLIPS)
    manifest = dump_noise(tmp_path, codec="dense,dtype=float32", num_classes=NUM_CLASSES, augment="flips.toml", views="all").manifest
    assert (manifest.grid.num_views, manifest.recipe.views.enumerated) == (4, True)
    teacher = teacher_of(tmp_path)
    torch.manual_seed(0)
    cached, live = LinearTeacher(NUM_CLASSES), LinearTeacher(NUM_CLASSES)
    live.load_state_dict(cached.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (cached, live)]
    loader = join_noise(tmp_path / "cache").loader(batch_size=10, seed=0)
    for epoch in range(6):
        for batch in loader.epoch(epoch):
            assert batch.soft is not None
            with torch.no_grad():
                answers = SoftTargets.from_logits(teacher(batch.images))
            losses = [
                distillation_loss(model(batch.images), soft, batch.labels, temperature=2.0)
                for model, soft in ((cached, batch.soft), (live, answers))
            ]
            assert abs(losses[0].item() - losses[1].item()) < 1e-4 * abs(losses[1].item())
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    weights = [parameters_to_vector(model.parameters()) for model in (cached, live)]
    assert torch.allclose(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_all_views_are_drawn_as_often_as_the_operations_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training from all views sees each as often as chance would have made it, other ones for each sample and epoch."""
    monkeypatch.chdir(tmp_path)
    Path("flips.toml").write_text(FLIPS)
    dump_noise(tmp_path, codec="dense", num_classes=NUM_CLASSES, augment="flips.toml", views="all")
    joined = join_noise(tmp_path / "cache")
    asked: list[np.ndarray] = []  # type: ignore[type-arg]
    soft_targets = joined.soft_targets
    monkeypatch.setattr(joined, "soft_targets", lambda rows, views: (asked.append(views), soft_targets(rows, views))[1])
    loader = joined.loader(batch_size=10, seed=0)
    for epoch in range(40):
        list(loader.epoch(epoch))
    views = np.concatenate(asked)
    assert np.allclose(np.bincount(views, minlength=4) / len(views), [0.4, 0.1, 0.4, 0.1], atol=0.03)


def test_all_views_of_an_endless_augmentation_are_refused(tmp_path: Path) -> None:
    """`--views all` of random crops names the operation that has no end; other words are no number of views."""
    with pytest.raises(SpecError, match="RandomResizedCrop"):
        dump_noise(tmp_path, codec="dense", num_classes=NUM_CLASSES, augment="rrc-flip", views="all")
    with pytest.raises(ConfigError, match="or all"):
        dump_noise(tmp_path, codec="dense", num_classes=NUM_CLASSES, augment="crop-flip", views="every")


def test_a_part_without_probed_samples_needs_the_same_libraries(tmp_path: Path) -> None:
    """Where no recorded pixels can be compared, other library versions are refused; the same ones are enough."""
    manifest = dump_noise(tmp_path, codec="dense", num_classes=NUM_CLASSES, augment="crop-flip").manifest
    noise, probed = Noise(NUM_CLASSES), {probe.row for probe in manifest.probes}
    part = wrap_dataset([noise[row] for row in range(len(noise)) if row not in probed], num_classes=NUM_CLASSES)
    Cache(tmp_path / "cache").join(part).check_probes()
    path = tmp_path / "cache" / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    document["recipe"]["views"]["versions"]["torchvision"] = "0.1.0"
    path.write_bytes(signed(document))
    with pytest.raises(MismatchError, match=r"none of the samples whose pixels were recorded .*0\.1\.0"):
        Cache(tmp_path / "cache").join(part).check_probes()


def test_evaluation_shows_whole_images_at_the_networks_size() -> None:
    """An image of the right size stays as it is; of others the middle is shown, and nothing is squashed."""
    end = EvaluationEnd((16, 16))
    right = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    assert torch.equal(end(right), right)
    assert end(right[:, :10, :12]).shape == (3, 16, 16)
    square = torch.zeros(3, 16, 30, dtype=torch.uint8)
    square[:, 4:12, 11:19] = 255
    bright = (end(square)[0] > 127).nonzero()
    height, width = (bright.max(0).values - bright.min(0).values + 1).tolist()
    assert abs(height - width) <= 1  # squashed, it would be half as wide
    wide = torch.zeros(3, 40, 80, dtype=torch.uint8)
    wide[:, :, 30:50] = 255
    shown = end(wide)
    assert shown.shape == (3, 16, 16)
    assert shown.float().mean() > 100
    assert torch.equal(end(torch.arange(5)), torch.arange(5))


@pytest.mark.slow
def test_a_folder_of_images_of_many_sizes_goes_the_whole_way(tmp_path: Path) -> None:
    """Fit, dump of mixed crops, students at another size with several views a load, evaluation: by the installed commands."""
    for number in range(60):
        path = tmp_path / "images" / ("test" if number % 3 == 0 else "train") / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number, size=(30 + number % 7, 40 - number % 11)), "JPEG"))
    fit = ("--augment", "rrc-flip,size=24", "--epochs", "1", "--batch-size", "8")
    kdcache("fit", "--model", "tiny", "--data", "folder:images,split=train", *fit, "--out", "teacher.safetensors", cwd=tmp_path)
    augment = ("--augment", "rrc-flip,size=24,mixup=0.2,cutmix=1.0", "--views", "4")
    kdcache("dump", "--teacher", "teacher.safetensors", "--data", "folder:images,split=train", *augment, "--out", "cache", cwd=tmp_path)
    train = ("train", "--student", "tiny", "--cache", "cache", "--epochs", "2", "--batch-size", "8", "--out", "runs")
    options = ("--input-size", "20", "--views-per-load", "2", "--view-order", "random")
    (student,) = kdcache_json(*train, *options, cwd=tmp_path)["students"]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < 20 and 0 <= row["top1"] <= 1 for row in rows)
    evaluate = ("evaluate", "--model", student["last"], "--data", "folder:images,split=test")
    assert kdcache_json(*evaluate, cwd=tmp_path)["top1"] == rows[-1]["top1"]
    assert kdcache_json(*evaluate, "--input-size", "28", cwd=tmp_path)["num_samples"] > 0
    refused = kdcache(*train[:-1], "other", "--batch-size", "9", "--views-per-load", "2", cwd=tmp_path, exits=2)
    assert "multiple of the views per load" in refused.stderr
    kdcache("verify", "cache", "--replay", "16", "--teacher", "teacher.safetensors", cwd=tmp_path)
