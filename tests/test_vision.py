"""`torchvision:NAME`: labels without decoding, and every dataset of torchvision either works or says why it does not."""

import csv
import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from images_on_disk import encoded, make_folder, opened, picture
from torch import Tensor
from torch.utils.data import IterableDataset

from kdcache.learning.datasets import held_out_split, wrap_dataset
from kdcache.learning.sources.vision import VisionSource
from kdcache.records.errors import KdcacheError, MismatchError, SpecError
from kdcache.records.specs import Spec

NAMES = [name for name in torchvision.datasets.__all__ if isinstance(getattr(torchvision.datasets, name), type)]


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_of_torchvision_opens_or_says_why_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an empty folder, each of torchvision's datasets opens or raises one of kdcache's own errors; none fetches anything."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail(f"{name} went to the network"))
    for trusted in (True, False):
        try:
            opened(f"torchvision:{name},root={tmp_path}", trusted=trusted)
        except KdcacheError as error:
            message = str(error)
        else:
            assert name == "FakeData"
            continue
        parameters = inspect.signature(getattr(torchvision.datasets, name)).parameters
        if "download" in parameters and "root" not in message and "required" not in message and "positional" not in message:
            assert "download=True" in message or "No module" in message or "split" in message, message


def write_mnist(root: Path, name: str) -> None:
    """The raw files of an MNIST-like set: ten images, one of each class, in training and test set."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, shift in (("train", 0), ("t10k", 3)):
        images = np.arange(10 * 28 * 28).reshape(10, 28, 28) % (251 + shift)
        labels = (np.arange(10) + shift) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def write_lists(folder: Path, lists: dict[str, list[str]]) -> None:
    """Text files of lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines))


def make_dtd(root: Path) -> None:
    """Describable textures: two classes."""
    make_folder(root / "dtd" / "dtd" / "images", {"banded": 2, "dotted": 1})
    write_lists(root / "dtd" / "dtd" / "labels", {"train1.txt": ["banded/1.png", "dotted/0.png"], "test1.txt": ["banded/0.png"]})


def make_food(root: Path) -> None:
    """Food: two classes."""
    make_folder(root / "food-101" / "images", {"pie": 1, "soup": 2})
    for file in (root / "food-101" / "images").rglob("*.png"):
        file.rename(file.with_suffix(".jpg"))
    (root / "food-101" / "meta").mkdir()
    (root / "food-101" / "meta" / "train.json").write_text('{"pie": ["pie/0"], "soup": ["soup/1"]}')


def make_gtsrb(root: Path) -> None:
    """Traffic signs: classes by number, without a list of them."""
    folder = make_folder(root / "gtsrb" / "GTSRB" / "Training", {"00000": 2, "00001": 1, "00002": 1})
    for file in folder.rglob("*.png"):
        file.rename(file.with_suffix(".ppm"))


def make_clevr(root: Path) -> None:
    """CLEVR: labels are numbers of objects."""
    folder = root / "clevr" / "CLEVR_v1.0"
    make_folder(folder / "images", {"train": 2})
    scenes = ['{"image_filename": "0.png", "objects": [1, 2, 3]}', '{"image_filename": "1.png", "objects": [1]}']
    write_lists(folder / "scenes", {"CLEVR_train_scenes.json": [f'{{"scenes": [{",".join(scenes)}]}}']})


def make_rendered_sst(root: Path) -> None:
    """Sentences as pictures: two classes."""
    make_folder(root / "rendered-sst2" / "train", {"negative": 1, "positive": 2})


def make_imagenette(root: Path) -> None:
    """A tenth of a hundredth of ImageNet."""
    make_folder(root / "imagenette2" / "train", {"n01440764": 1, "n02102040": 2})
    for file in (root / "imagenette2").rglob("*.png"):
        file.rename(file.with_suffix(".JPEG"))


def make_caltech(root: Path) -> None:
    """Caltech 101: two classes, and one that is none."""
    folder = make_folder(root / "caltech101" / "101_ObjectCategories", {"BACKGROUND_Google": 1, "ant": 2, "bass": 1})
    for file in folder.rglob("*.png"):
        file.rename(file.with_name(f"image_{int(file.stem) + 1:04d}.jpg"))


def make_celeba(root: Path) -> None:
    """Faces: forty attributes, an identity."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = ["000001.jpg", "000002.jpg"]
    for number, name in enumerate(names):
        (folder / "img_align_celeba" / name).write_bytes(encoded(picture(number), "JPEG"))
    attributes = [" ".join([name, *["1", "-1"] * 20]) for name in names]
    zeros = [f"{name} 0 0 0 0" for name in names]
    marks = [" ".join([name, *["0"] * 10]) for name in names]
    write_lists(
        folder,
        {
            "list_eval_partition.txt": [f"{name} 0" for name in names],
            "identity_CelebA.txt": [f"{names[0]} 1", f"{names[1]} 4"],
            "list_bbox_celeba.txt": ["2", "image_id x y w h", *zeros],
            "list_landmarks_align_celeba.txt": ["2", " ".join("abcdefghij"), *marks],
            "list_attr_celeba.txt": ["2", " ".join(f"a{i}" for i in range(40)), *attributes],
        },
    )


SETS: list[tuple[str, str, Any, int, list[int]]] = [
    ("MNIST", "", lambda root: write_mnist(root, "MNIST"), 10, list(range(10))),
    ("FashionMNIST", ",train=False", lambda root: write_mnist(root, "FashionMNIST"), 10, [(i + 3) % 10 for i in range(10)]),
    ("KMNIST", "", lambda root: write_mnist(root, "KMNIST"), 10, list(range(10))),
    ("DTD", "", make_dtd, 2, [0, 1]),
    ("Food101", "", make_food, 2, [0, 1]),
    ("GTSRB", "", make_gtsrb, 3, [0, 0, 1, 2]),
    ("CLEVRClassification", "", make_clevr, 4, [3, 1]),
    ("RenderedSST2", "", make_rendered_sst, 2, [0, 1, 1]),
    ("Imagenette", "", make_imagenette, 2, [0, 1, 1]),
    ("EuroSAT", "", lambda root: make_folder(root / "eurosat" / "2750", {"Forest": 2, "River": 1}), 2, [0, 0, 1]),
    ("Country211", "", lambda root: make_folder(root / "country211" / "train", {"AD": 1, "AE": 1}), 2, [0, 1]),
    ("ImageFolder", "", lambda root: make_folder(root, {"a": 1, "b": 2}), 2, [0, 1, 1]),
]


@pytest.mark.parametrize(("name", "options", "make", "num_classes", "labels"), SETS, ids=[item[0] for item in SETS])
def test_classification_sets_work(
    name: str, options: str, make: Any, num_classes: int, labels: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes are counted and all labels known without decoding every sample; they are the labels that the samples come with."""
    make(tmp_path)
    dataset = opened(f"torchvision:{name},root={tmp_path}{options}")
    assert dataset.num_classes == num_classes
    with monkeypatch.context() as patch:
        patch.setattr(VisionSource, "__getitem__", lambda *_: pytest.fail("decoded a sample for the labels"))
        assert dataset.labels.tolist() == labels
    assert [dataset[row][1] for row in range(len(dataset))] == labels
    assert len(np.unique(dataset.keys, axis=0)) == len(labels)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that another package has to read is not taken for one with damaged images."""
    make_caltech(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(SpecError, match=r"row 0 cannot be read without another package: .*scipy"):
        opened(f"torchvision:Caltech101,root={tmp_path}", skip_unreadable=True)


class Renamed:
    """A dataset that keeps other labels than its samples come with."""

    targets = (7, 8, 9)
    files = 3

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), index, dtype=torch.uint8), self.targets[index] - 7


def test_kept_labels_are_compared_with_the_samples() -> None:
    """Labels that a dataset keeps are not believed where its samples come with others."""
    assert VisionSource(Renamed()).sample_labels(np.arange(3)) is None
    assert wrap_dataset(VisionSource(Renamed())).labels.tolist() == [0, 1, 2]


def test_several_kinds_of_target_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set with a vector of targets a sample is refused as what it is; with one whole number as its target it works."""
    make_celeba(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda _: True)
    with pytest.raises(MismatchError, match=r"expected one whole number as the label, found torch.int64 \[40\]; kdcache needs a classif"):
        opened(f"torchvision:CelebA,root={tmp_path}")
    assert opened(f"torchvision:CelebA,root={tmp_path},target_type=identity").labels.tolist() == [1, 4]
    with pytest.raises(MismatchError, match="expected one whole number as the label, found a tuple of 2"):
        wrap_dataset([(picture(0), (1, 2))])


def test_detection_and_pairs_are_refused(tmp_path: Path) -> None:
    """Boxes, masks and pairs of images are refused with what was found."""
    for name in ("image_2", "label_2"):
        (tmp_path / "Kitti" / "raw" / "training" / name).mkdir(parents=True)
    (tmp_path / "Kitti" / "raw" / "training" / "image_2" / "0.png").write_bytes(encoded(picture(1)))
    with (tmp_path / "Kitti" / "raw" / "training" / "label_2" / "0.txt").open("w") as file:
        csv.writer(file, delimiter=" ").writerow(["Car", *["0"] * 14])
    with pytest.raises(
        MismatchError, match="expected one whole number as the label, found a list of 1; kdcache needs a classification set"
    ):
        opened(f"torchvision:Kitti,root={tmp_path}")


class Stream(IterableDataset[Any]):
    """Samples one after another."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter([])


def test_what_can_only_be_iterated_over_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset without random access is refused with the reason, also where it has a length, and also from a function."""
    message = r"expected a map-style dataset .* which can only be iterated over: kdcache draws samples in any order"
    with pytest.raises(SpecError, match=message):
        wrap_dataset(Stream())
    (tmp_path / "streams.py").write_text("def make():\n    yield 1, 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError, match=message):
        opened("py:streams:make")


def test_samples_that_are_no_pairs_are_refused() -> None:
    """A dataset of dictionaries is refused with the names in them, not unpacked into its keys."""
    with pytest.raises(MismatchError, match=r"row 0: expected a \(sample, label\) pair, found a dict of image, label"):
        wrap_dataset([{"image": picture(0), "label": 1}])  # type: ignore[list-item]
    with pytest.raises(MismatchError, match=r"expected one whole number as the label, found float 0\.5"):
        wrap_dataset([(picture(0), 0.5)])


@pytest.mark.parametrize(
    ("spec", "held_out"),
    [
        ("torchvision:EMNIST,root=/d,split=letters", "torchvision:EMNIST,root=/d,split=letters,train=False"),
        ("torchvision:CLEVRClassification,root=/d", "torchvision:CLEVRClassification,root=/d,split=val"),
        ("torchvision:Country211,root=/d", "torchvision:Country211,root=/d,split=valid"),
        ("torchvision:Food101,root=/d", "torchvision:Food101,root=/d,split=test"),
        ("torchvision:Caltech101,root=/d", None),
    ],
)
def test_held_out_splits_of_torchvision(spec: str, held_out: str | None) -> None:
    """The held-out split is one that the class has, with labels."""
    found = held_out_split(Spec.parse(spec))
    assert (None if found is None else str(found)) == held_out


def test_an_unreadable_image_is_named_by_its_file(tmp_path: Path) -> None:
    """Torchvision's own folders name the file that cannot be read, and can do without it."""
    make_folder(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "a" / "1.png").write_bytes(b"")
    spec = f"torchvision:ImageFolder,root={tmp_path}"
    with pytest.raises(KdcacheError, match=rf"{tmp_path / 'a' / '1.png'} cannot be read"):
        _ = opened(spec).keys
    whole = opened(spec, skip_unreadable=True)
    assert [(sample.name, sample.key) for sample in whole.skipped] == [(str(tmp_path / "a" / "1.png"), "")]
    assert opened(spec, skipped=whole.skipped).record() == whole.record()
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "a" / "1.png")
    assert len(opened(spec, skipped=whole.skipped)) == 3
