"""Changed data is noticed: a cache of a folder against copies, renamed, re-sorted and partial ones, and against changed ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import kdcache as command
from commands import kdcache_json
from images_on_disk import encoded, make_folder, opened, picture

import kdcache
from kdcache.learning.checkpoints import save_model
from kdcache.learning.models import build_model
from kdcache.records.errors import CacheExistsError, MismatchError, UnreadableSampleError
from kdcache.records.specs import Spec

TRAINING = kdcache.TrainingOptions(epochs=1, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a set of ten images in two classes, and a cache of two views of them."""
    folder = tmp_path_factory.mktemp("changed")
    make_folder(folder / "images", {"cat": 6, "owl": 4})
    spec = Spec.parse("tiny,channels=3,image_size=12,num_classes=2")
    torch.manual_seed(0)
    save_model(folder / "teacher.safetensors", build_model(spec, trusted=True), spec=spec, metadata={})
    kdcache.dump(folder / "teacher.safetensors", f"folder:{folder / 'images'}", folder / "cache", views=2, device="cpu")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the set elsewhere."""
    return Path(shutil.copytree(made / "images", tmp_path / "copy"))


def answers(cache: kdcache.Cache, spec: str, **options: bool) -> dict[bytes, list[float]]:
    """The cache's answers to the first view of each sample of a dataset, by the sample's key."""
    joined = cache.join(opened(spec), **options)
    dataset = joined.samples.dataset
    soft = joined.soft_targets(np.arange(len(dataset)), np.zeros(len(dataset), np.int64))
    return {key.tobytes(): probs.tolist() for key, probs in zip(dataset.keys, soft.log_probs, strict=True)}


def rename(root: Path) -> None:
    """Other names, which sort in another order, and one image a folder deeper."""
    for number, file in enumerate(sorted((root / "cat").iterdir())):
        file.rename(root / "cat" / f"image-{9 - number}.png")
    (root / "owl" / "deeper").mkdir()
    (root / "owl" / "0.png").rename(root / "owl" / "deeper" / "0.png")


@pytest.mark.parametrize("change", [lambda _: None, rename, lambda root: (root / "cat" / "2.png").unlink()])
def test_the_same_samples_are_found_anywhere(change: Callable[[Path], None], made: Path, copy: Path) -> None:
    """A copied, renamed, re-sorted or partial set gets each sample's own answers, from the installed command too."""
    change(copy)
    cache = kdcache.Cache(made / "cache")
    whole, found = answers(cache, f"folder:{made / 'images'}"), answers(cache, f"folder:{copy}")
    assert found == {key: whole[key] for key in found}
    assert len(found) == sum(1 for _ in copy.rglob("*.png"))
    data = f"folder:{copy}"
    assert kdcache.train(["tiny"], made / "cache", copy.parent / "out", data=data, options=TRAINING).students


@pytest.mark.parametrize("kind", ["changed", "added"])
def test_a_changed_or_added_sample_is_refused(kind: str, made: Path, copy: Path) -> None:
    """Samples that the cache has not are counted and named, with the option that goes on; with it they are left out."""
    name = "3.png" if kind == "changed" else "new.png"
    (copy / "cat" / name).write_bytes(encoded(picture(900)))
    cache, count = kdcache.Cache(made / "cache"), 10 if kind == "changed" else 11
    with pytest.raises(MismatchError) as caught:
        cache.join(opened(f"folder:{copy}"))
    message = str(caught.value)
    assert message.startswith(f"1 of {count} samples are not in the cache, changed or added since: {copy / 'cat' / name} (key ")
    assert f"It was made from folder:{made / 'images'} with 10 samples" in message
    assert message.endswith("or train on the others: --skip-unknown")
    joined = cache.join(opened(f"folder:{copy}"), skip_unknown=True)
    assert (joined.num_unknown, len(joined.samples)) == (1, count - 1)
    whole, found = answers(cache, f"folder:{made / 'images'}"), answers(cache, f"folder:{copy}", skip_unknown=True)
    assert found == {key: whole[key] for key in found}
    seen = sum(len(labels) for _, labels, _ in cache.batches(f"folder:{copy}", skip_unknown=True))
    assert seen == count - 1


def test_a_wholly_unknown_set_is_refused(made: Path) -> None:
    """Where no sample is in the cache, nothing can be left out; decoded pairs of a cache made from files say why."""
    dataset = opened(f"folder:{made / 'images'}")
    with pytest.raises(MismatchError, match=r"10 of 10 samples are not .* made from files, hand over its spec$"):
        next(iter(kdcache.Cache(made / "cache").batches([dataset[row] for row in range(10)], skip_unknown=True)))


def test_a_changed_set_from_the_command_line(made: Path, copy: Path) -> None:
    """`kdcache train` refuses a changed sample with exit code 3 and its name, and goes on with --skip-unknown."""
    (copy / "owl" / "1.png").write_bytes(encoded(picture(901)))
    arguments = ("train", "--student", "tiny", "--cache", made / "cache", "--data", f"folder:{copy}", "--epochs", "1", "--device", "cpu")
    refused = command(*arguments, "--out", "out", cwd=copy.parent, exits=3)
    assert "1 of 10 samples are not in the cache" in refused.stderr
    assert "--skip-unknown" in refused.stderr
    done = command(*arguments, "--out", "out", "--skip-unknown", cwd=copy.parent)
    assert "left out 1 of 10 samples that are not in the cache" in done.stderr


def test_another_number_of_classes_is_refused(made: Path, tmp_path: Path) -> None:
    """A set with more or fewer classes than the teacher is refused before any work."""
    make_folder(tmp_path / "more", {"cat": 1, "dog": 1, "owl": 1})
    with pytest.raises(MismatchError, match=r"2 classes.*the dataset has 3"):
        kdcache.dump(made / "teacher.safetensors", f"folder:{tmp_path / 'more'}", tmp_path / "cache", device="cpu")
    with pytest.raises(MismatchError, match="the dataset has 3 classes, the cached teacher 2"):
        kdcache.Cache(made / "cache").join(opened(f"folder:{tmp_path / 'more'}"))


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_classes_with_other_numbers_are_refused(change: str, made: Path, copy: Path) -> None:
    """A class folder that is missing, or sorts elsewhere by its new name, would give samples the labels of other classes."""
    if change == "missing":
        shutil.rmtree(copy / "cat")
    else:
        (copy / "cat").rename(copy / "wildcat")
    count = 4 if change == "missing" else 10
    with pytest.raises(
        MismatchError, match=rf"^{count} of {count} samples have other labels than in the cache: \S+/owl/0\.png \(1, here 0\)"
    ):
        kdcache.Cache(made / "cache").join(opened(f"folder:{copy}"), skip_unknown=True)


def test_equal_samples_may_have_several_labels(made: Path, tmp_path: Path) -> None:
    """An image that lies in two class folders has one key and two labels: both are known, also where only one of them is asked for."""
    images = Path(shutil.copytree(made / "images", tmp_path / "images"))
    shutil.copy(images / "cat" / "0.png", images / "owl" / "cat.png")
    kdcache.dump(made / "teacher.safetensors", f"folder:{images}", tmp_path / "cache", views=1, device="cpu")
    (images / "cat" / "0.png").unlink()
    joined = kdcache.Cache(tmp_path / "cache").join(opened(f"folder:{images}"))
    assert len(joined.samples) == 10


def test_a_sample_that_an_augmentation_cannot_do_is_named(made: Path, copy: Path) -> None:
    """Operations are tried on the first image: what fails on another one is named with its view, in place of a traceback."""
    (copy.parent / "crop.toml").write_text("[[ops]]\nop = 'RandomCrop'\nsize = [9, 11]\n")
    (copy / "owl" / "small.png").write_bytes(encoded(picture(902, (7, 5))))
    arguments = ("dump", "--teacher", made / "teacher.safetensors", "--data", f"folder:{copy}", "--augment", "crop.toml", "--out", "out")
    for views, message in (("1", "the augmentation fails: ValueError"), ("all", "was counted for images of")):
        refused = command(*arguments, "--views", views, cwd=copy.parent, exits=2 if views == "1" else 3)
        assert f"view 0 of {copy / 'owl' / 'small.png'}: " in refused.stderr
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
        shutil.rmtree(copy.parent / "out")


def test_unreadable_images_of_a_dump(made: Path, copy: Path) -> None:
    """A dump names an unreadable image and stops; with --skip-unreadable it leaves such out, records them, and training does so too."""
    whole = encoded(picture(3), "JPEG")
    (copy / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (copy / "owl" / "0.png").write_bytes(b"")
    data, out = f"folder:{copy}", copy.parent / "cache"
    with pytest.raises(UnreadableSampleError, match=r"cut\.jpg cannot be read .*--skip-unreadable"):
        kdcache.dump(made / "teacher.safetensors", data, out, device="cpu")
    with pytest.raises(CacheExistsError, match=r"dataset\.num_samples"):
        kdcache.dump(made / "teacher.safetensors", data, out, skip_unreadable=True, device="cpu")
    shutil.rmtree(out)
    arguments = ("dump", "--teacher", made / "teacher.safetensors", "--data", data, "--out", out, "--views", "1", "--skip-unreadable")
    done = command(*arguments, cwd=copy.parent)
    assert f"left out 2 of 11 samples that cannot be read: {copy / 'cat' / 'cut.jpg'}, {copy / 'owl' / '0.png'}" in done.stderr
    skipped = json.loads((out / "manifest.json").read_text())["provenance"]["skipped"]
    assert [sample["name"] for sample in skipped] == [str(copy / "cat" / "cut.jpg"), str(copy / "owl" / "0.png")]
    assert all(len(sample["key"]) == 32 for sample in skipped)
    assert kdcache_json(*arguments, cwd=copy.parent)["num_samples"] == 9
    trained = command("train", "--student", "tiny", "--cache", out, "--out", "out", "--epochs", "1", "--device", "cpu", cwd=copy.parent)
    assert "left out 2 samples that the dump could not read either" in trained.stderr


def test_a_cache_without_skipped_samples_does_not_mention_them(made: Path) -> None:
    """The record of skipped samples is left out of a manifest that has none, so that such manifests stay as they were."""
    assert "skipped" not in (made / "cache" / "manifest.json").read_text()


def test_subsets_of_a_dataset_keep_their_keys(made: Path) -> None:
    """`subset` and `without` choose samples with their keys, labels and names."""
    dataset = opened(f"folder:{made / 'images'}")
    part = dataset.subset([7, 2])
    assert part.keys.tolist() == dataset.keys[[7, 2]].tolist()
    assert (part.labels.tolist(), part.name_of(0), len(part)) == ([1, 0], dataset.name_of(7), 2)
    assert torch.equal(part[1][0], dataset[2][0])
    assert dataset.without([0, 9]).keys.tolist() == dataset.keys[1:9].tolist()
    assert part.subset([1]).name_of(0) == dataset.name_of(2)
