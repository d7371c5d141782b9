"""Samples that are no images: a table and a text through the installed command, from the teacher to the student."""

from pathlib import Path

import pytest
import torch
from commands import kdcache as command
from commands import kdcache_json

import kdcache
from kdcache.learning.datasets import wrap_dataset
from kdcache.learning.loader import to_unit_range
from kdcache.learning.sources.checked import as_sample_tensor
from kdcache.learning.views import make_views
from kdcache.records.errors import MismatchError, SpecError

MODULE = """
import torch


class Rows(torch.nn.Sequential):
    def __init__(self, width=8):
        super().__init__(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))


class Words(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(10, width), torch.nn.Linear(width, 3)

    def forward(self, tokens):
        assert tokens.dtype == torch.int64 and tokens.shape[1:] == (6,)
        return self.head(self.words(tokens).mean(1))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models for rows and for words, and teachers of them."""
    (tmp_path / "nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import nets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    torch.save(nets.Rows(16).state_dict(), tmp_path / "rows.pt")
    torch.save(nets.Words(16).state_dict(), tmp_path / "words.pt")
    return tmp_path


def test_a_table(folder: Path) -> None:
    """A CSV file goes from dump to training: float features are neither scaled nor augmented, and join on their values."""
    lines = [f"{i / 7},{i % 3},{-i},{'yes' if i % 2 else 'no'}" for i in range(24)]
    (folder / "table.csv").write_text("\n".join(["a,b,c,label", *lines]))
    dumped = kdcache_json(
        "dump", "--teacher", "rows.pt", "--arch", "py:nets:Rows,width=16", "--data", "csv:table.csv", "--augment", "none", "--views", "1",
        "--out", "cache", cwd=folder, PYTHONPATH=str(folder),
    )  # fmt: skip
    assert (dumped["num_samples"], dumped["num_views"]) == (24, 1)
    (folder / "sorted.csv").write_text("\n".join(["a,b,c,label", *lines[:3:-1]]))
    command(
        "train", "--student", "py:nets:Rows", "--cache", "cache", "--data", "csv:sorted.csv", "--eval-data", "csv:table.csv", "--out", "out",
        "--epochs", "2", "--batch-size", "8", cwd=folder, PYTHONPATH=str(folder),
    )  # fmt: skip
    for inputs, labels, soft in kdcache.Cache(folder / "cache").batches(
        wrap_dataset([(torch.tensor([i / 7, i % 3, -i]), i % 2) for i in range(24)]), batch_size=24
    ):
        assert inputs.dtype == torch.float32
        assert sorted(inputs[:, 2].tolist()) == [-i for i in range(23, -1, -1)]
        assert labels.tolist() == [int(-c) % 2 for c in inputs[:, 2]]
        assert soft.num_classes == 2


def test_text(folder: Path) -> None:
    """Saved sentences go from dump to training as int64 tokens, the same dtype from the tokenizer to the network."""
    datasets, tokenizers = pytest.importorskip("datasets"), pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["?", "[PAD]", "a", "good", "bad", "film"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))  # noqa: S106
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    names = datasets.ClassLabel(names=["no", "yes", "perhaps"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["good " * i + "film" for i in range(12)], "label": [i % 3 for i in range(12)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(folder / "texts")
    data = "hf:texts,tokenizer=tokenizer.json,length=6"
    command(
        "dump", "--teacher", "words.pt", "--arch", "py:nets:Words,width=16", "--data", data, "--augment", "none", "--views", "1",
        "--out", "cache", cwd=folder, PYTHONPATH=str(folder),
    )  # fmt: skip
    trained = kdcache_json(
        "train", "--student", "py:nets:Words", "--cache", "cache", "--out", "out", "--epochs", "1", "--batch-size", "4",
        cwd=folder, PYTHONPATH=str(folder),
    )  # fmt: skip
    assert trained["students"][0]["name"] == "nets.Words"


def test_only_pixels_are_scaled() -> None:
    """uint8 images become floats in [0, 1]; features and tokens stay what they are."""
    cpu = torch.device("cpu")
    assert to_unit_range(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), cpu).unique().tolist() == [1.0]
    for sample in (torch.tensor([[300.0, -1.0]]), torch.tensor([[300, 1]])):
        moved = to_unit_range(sample, cpu)
        assert (moved.dtype, moved.tolist()) == (sample.dtype, sample.tolist())


@pytest.mark.parametrize("augment", ["crop-flip", "rrc-flip", "none,mixup=0.2"])
def test_augmentations_are_for_images(augment: str) -> None:
    """An augmentation of something else than images is a SpecError with the option that goes on."""
    with pytest.raises(SpecError, match=r"is for images, found samples of shape \[3\]; add --augment none"):
        make_views(augment, seed=0, image_shape=(3,))
    with pytest.raises(SpecError, match=r"--views all is for images"):
        make_views("none", seed=0, image_shape=(3,), enumerated=True)
    views, sample = make_views("none", seed=0, image_shape=(3,)), torch.tensor([1.0, 2.0, 3.0])
    assert views(sample, b"key", 5) is sample


def test_presets_are_for_images() -> None:
    """A preset network for rows of a table is refused, with what to use instead."""
    from kdcache.learning.models import resolve_model_spec
    from kdcache.records.specs import Spec

    with pytest.raises(SpecError, match=r"takes images \[channels, height, width\], found samples of \[3\]; give a py: model"):
        resolve_model_spec(Spec.parse("small"), num_classes=2, image_shape=(3,))


@pytest.mark.parametrize("sample", [torch.zeros(3), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=torch.uint8)])
def test_samples_that_are_taken(sample: torch.Tensor) -> None:
    """float32 features, int64 tokens and uint8 images are samples as they are."""
    assert torch.equal(as_sample_tensor(sample), sample)


@pytest.mark.parametrize(
    "sample", [torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(())]
)
def test_samples_that_are_refused(sample: torch.Tensor) -> None:
    """Other types and shapes are refused with the kinds that there are: nothing is cast behind the user's back."""
    message = r"expected samples as uint8 \[channels, height, width\], float32 \[features\] or int64 tokens \[length\], found torch\."
    with pytest.raises(MismatchError, match=message):
        as_sample_tensor(sample)


def test_texts_of_several_lengths_are_refused() -> None:
    """Samples of different lengths cannot be one batch; the message shows both."""
    from kdcache.learning.loader import stack_images

    with pytest.raises(MismatchError, match=r"\[3\] and \[4\]"):
        stack_images([torch.zeros(3), torch.zeros(4)])
