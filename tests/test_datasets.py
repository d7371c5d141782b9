"""Datasets: decoded samples, labels and keys that belong to the pixels, wherever they come from."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import FakeData

from kdcache.learning import datasets
from kdcache.learning.datasets import Dataset, open_dataset, wrap_dataset
from kdcache.learning.sources.checked import as_sample_tensor
from kdcache.learning.sources.source import sample_key
from kdcache.records.errors import KdcacheError, MismatchError, SpecError
from kdcache.records.specs import Spec


def opened(spec: str, *, trusted: bool = True) -> Dataset:
    """The dataset that a spec string names."""
    return open_dataset(Spec.parse(spec), trusted=trusted)


@pytest.fixture(scope="module")
def train() -> Dataset:
    """The embedded training set."""
    return opened("fashion-mini")


@pytest.fixture(scope="module")
def held_out() -> Dataset:
    """The embedded test set."""
    return opened("fashion-mini,split=test")


def key_set(dataset: Dataset) -> set[bytes]:
    """The dataset's keys as a set."""
    return {key.tobytes() for key in dataset.keys}


def test_embedded_set_is_balanced(train: Dataset, held_out: Dataset) -> None:
    """The embedded set has 10,000 training and 2,000 test images, grey, 28 by 28, the same number of each of ten classes."""
    for dataset, each in ((train, 1000), (held_out, 200)):
        assert len(dataset) == 10 * each
        assert dataset.image_shape == (1, 28, 28)
        assert dataset.num_classes == 10
        assert np.bincount(dataset.labels).tolist() == [each] * 10
        image, label = dataset[17]
        assert (image.shape, image.dtype, type(image)) == ((1, 28, 28), torch.uint8, Tensor)
        assert label == dataset.labels[17]


def test_embedded_keys_are_unique_and_splits_share_none(train: Dataset, held_out: Dataset) -> None:
    """No image is there twice, and none of the test images is among the training images."""
    assert len(key_set(train)) == 10_000
    assert len(key_set(held_out)) == 2_000
    assert not key_set(train) & key_set(held_out)
    assert train.keys.shape == (10_000, 16)


def test_records_say_nothing_of_the_place(train: Dataset, tmp_path: Path) -> None:
    """A recipe names the dataset, its size and its keys, and leaves out where it lies."""
    assert train.record().spec == "fashion-mini"
    assert train.record().num_samples == 10_000
    assert train.record().sha256 != opened("fashion-mini,split=test").record().sha256
    (tmp_path / "cats").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "cats" / "a.png")
    assert opened(f"torchvision:ImageFolder,root={tmp_path}").record().spec == "torchvision:ImageFolder"


def test_keys_follow_the_samples_into_any_order(held_out: Dataset) -> None:
    """A sample has the same key wherever it stands and whatever stands beside it; the digest of the set knows the order."""
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:300].tolist()
    turned = wrap_dataset(Subset(held_out.source, order), num_classes=10)  # type: ignore[arg-type]
    assert np.array_equal(turned.keys, held_out.keys[order])
    assert np.array_equal(turned.labels, held_out.labels[order])
    back = wrap_dataset(Subset(held_out.source, sorted(order)), num_classes=10)  # type: ignore[arg-type]
    assert key_set(back) == key_set(turned)
    assert back.record().sha256 != turned.record().sha256


def test_a_key_is_its_pixels_and_shape(held_out: Dataset) -> None:
    """Equal pixels have equal keys, whatever holds them; one other bit or another shape gives another key."""
    image = held_out[0][0]
    assert sample_key(image) == held_out.keys[0].tobytes()
    assert sample_key(as_sample_tensor(Image.fromarray(image[0].numpy()))) == sample_key(image)
    assert sample_key(image.transpose(1, 2).contiguous().transpose(1, 2)) == sample_key(image)
    changed = image.clone()
    changed[0, 3, 4] ^= 1
    assert sample_key(changed) != sample_key(image)
    assert sample_key(image.reshape(1, 14, 56)) != sample_key(image)
    assert sample_key(torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)).hex() == "e838942313dba575cfb6e0f0980356d2"


def test_a_list_of_pairs_is_a_dataset() -> None:
    """A list of (PIL image, label) is wrapped as it is; the classes are counted from the labels, or said."""
    pairs = [(Image.new("RGB", (6, 4), colour), label) for colour, label in (("red", 0), ("lime", 4), ("blue", 1))]
    dataset = wrap_dataset(pairs)
    assert (len(dataset), dataset.num_classes, dataset.image_shape) == (3, 5, (3, 4, 6))
    assert [dataset[row][0][:, 0, 0].tolist() for row in range(3)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert dataset.labels.tolist() == [0, 4, 1]
    assert str(dataset.spec) == "memory"
    assert wrap_dataset(pairs, num_classes=7).num_classes == 7


def test_a_torchvision_object_is_a_dataset() -> None:
    """A torchvision dataset object is wrapped with its images, labels and, where it names them, its classes."""
    source = FakeData(size=5, image_size=(3, 8, 9), num_classes=4)
    dataset = wrap_dataset(source, num_classes=4)
    assert dataset.image_shape == (3, 8, 9)
    assert dataset.labels.tolist() == [int(source[row][1]) for row in range(5)]


class Relabelled:
    """Has raw `targets`, and gives other labels, as a torchvision dataset with a target transform does."""

    def __init__(self) -> None:
        self.targets = [3, 4, 5]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), index, dtype=torch.uint8), self.targets[index] - 3


def test_labels_are_those_of_the_samples() -> None:
    """All labels at once are the labels that the samples come with, also where the source changes its targets on the way."""
    dataset = wrap_dataset(Relabelled())
    assert dataset.labels.tolist() == [dataset[row][1] for row in range(3)] == [0, 1, 2]
    assert dataset.num_classes == 3


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.rand(1, 4, 4), "found torch.float32 [1, 4, 4]"),
        (torch.zeros(4, 4, dtype=torch.uint8), "found torch.uint8 [4, 4]"),
        (np.zeros((4, 4, 3), np.uint8), "found ndarray"),
        ("image.png", "found str"),
        (None, "found NoneType"),
        (Image.new("1", (4, 4)), "found torch.bool"),
        (Image.new("I;16", (4, 4)), "found torch.uint16"),
        (Image.new("F", (4, 4)), "found torch.float32"),
    ],
    ids=lambda value: value[6:] if isinstance(value, str) and value.startswith("found") else "",
)
def test_samples_that_are_no_uint8_images_are_refused(sample: object, message: str) -> None:
    """A sample that is neither a PIL image of bytes nor a uint8 tensor is a MismatchError that shows what it is."""
    with pytest.raises(MismatchError, match=re.escape(message)):
        wrap_dataset([(sample, 0)])[0]


def test_palette_images_are_not_taken_for_grey() -> None:
    """An image with a palette gives its colours, or is refused; the numbers of its palette are no pixels."""
    image = Image.new("RGB", (4, 4), "red").convert("P", palette=Image.Palette.ADAPTIVE)
    try:
        tensor = as_sample_tensor(image)
    except KdcacheError:
        return
    assert tensor[:, 0, 0].tolist() == [255, 0, 0]


def test_an_empty_dataset_is_refused() -> None:
    """A dataset without samples is one of kdcache's own errors, however it is handed over."""
    with pytest.raises(SpecError, match="the dataset is empty"):
        opened("py:builtins:list")
    with pytest.raises(KdcacheError):
        wrap_dataset([])


def test_code_is_run_for_the_user_only() -> None:
    """A `py:` dataset that was read from a file is refused with the flag that allows it; one that was typed is called."""
    with pytest.raises(SpecError, match=re.escape("type it yourself: --data py:builtins:list")):
        opened("py:builtins:list", trusted=False)
    dataset = opened("py:torchvision.datasets:FakeData,size=3,image_size=(1,5,5)")
    assert (len(dataset), dataset.image_shape) == (3, (1, 5, 5))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar", "unknown dataset 'cifar'; expected one of: fashion-mini, folder:PATH, torchvision:NAME,root=DIR, hf:NAME,"),
        ("folders:/data", "unknown dataset 'folders:/data'"),
        ("fashion-mini,split=val", "no split 'val' of 'fashion-mini'; expected train or test"),
        ("fashion-mini,root=/data", "unknown option root; fashion-mini takes: split"),
        ("torchvision:CIFAR11,root=x", "torchvision has no dataset 'CIFAR11'"),
        ("torchvision:wrap_dataset_for_transforms_v2,root=x", "torchvision has no dataset"),
        ("torchvision:CIFAR10", "say where the files are: torchvision:CIFAR10,root=DIR"),
        ("torchvision:CIFAR10,root=nowhere,trian=True", "unexpected keyword argument 'trian'"),
        ("py:nowhere:make", "No module named 'nowhere'"),
        ("py:builtins:nothing", "has no attribute 'nothing'"),
        ("py:builtins:int", "expected a map-style dataset (with a length and an index), found int"),
        ("py:builtins:list,width=3", "expected py:MODULE:FUNCTION[,key=value]*"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    """A dataset that does not exist, or options that it does not take, are a SpecError that says what was expected."""
    with pytest.raises(SpecError, match=re.escape(message)):
        opened(spec)


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "SVHN"])
def test_missing_files_say_how_to_get_them(name: str, tmp_path: Path) -> None:
    """Where a torchvision dataset's files are absent, the message holds the very spec that would download them."""
    mending = f"torchvision:{name},download=True,root={tmp_path}"
    with pytest.raises(SpecError, match=re.escape(f"On a machine with a network: {mending}")):
        opened(f"torchvision:{name},root={tmp_path}")
    assert str(Spec.parse(mending)) == mending


@pytest.mark.parametrize("name", ["ImageFolder", "FakeData"])
def test_nothing_is_promised_that_a_dataset_does_not_take(name: str, tmp_path: Path) -> None:
    """A dataset that cannot be downloaded, or needs no files, is refused without advice that would fail too."""
    with pytest.raises(SpecError) as caught:
        opened(f"torchvision:{name},root={tmp_path / 'nowhere'}")
    assert "download=True" not in str(caught.value)


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """A root that is a file, not a folder, is a SpecError like an absent one."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="file"):
        opened(f"torchvision:ImageFolder,root={tmp_path / 'file'}")


def test_a_folder_of_images_opens(tmp_path: Path) -> None:
    """`torchvision:ImageFolder` reads one folder for each class, and knows the classes by the folders."""
    for name, colours in {"cats": ("red", "lime"), "dogs": ("blue",)}.items():
        (tmp_path / name).mkdir()
        for colour in colours:
            Image.new("RGB", (5, 4), colour).save(tmp_path / name / f"{colour}.png")
    dataset = opened(f"torchvision:ImageFolder,root={tmp_path}")
    assert (len(dataset), dataset.num_classes, dataset.image_shape) == (3, 2, (3, 4, 5))
    assert dataset.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("spec", "held_out_spec"),
    [
        ("fashion-mini", "fashion-mini,split=test"),
        ("torchvision:CIFAR100,root=/d,train=True", "torchvision:CIFAR100,root=/d,train=False"),
        ("torchvision:SVHN,root=/d", "torchvision:SVHN,root=/d,split=test"),
        ("torchvision:ImageNet,root=/d", "torchvision:ImageNet,root=/d,split=val"),
        ("torchvision:ImageFolder,root=/d", None),
        ("py:mine:make", None),
    ],
)
def test_held_out_split_by_convention(spec: str, held_out_spec: str | None) -> None:
    """A training set's held-out split follows from the dataset's own convention, and from nothing where there is none."""
    found = datasets.held_out_split(Spec.parse(spec))
    assert (None if found is None else str(found)) == held_out_spec
