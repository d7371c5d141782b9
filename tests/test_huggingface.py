"""`hf:NAME`: datasets of Hugging Face, without a network."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images_on_disk import encoded, opened, picture

from kdcache.learning.datasets import held_out_split, with_absolute_paths, wrap_dataset
from kdcache.learning.sources.huggingface import hub_images
from kdcache.learning.sources.source import bytes_key
from kdcache.records.errors import SpecError, UnreadableSampleError
from kdcache.records.specs import Spec

hf = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["a good film", "bad", "good good good good good good good", "a bad film"]


def images(count: int = 4) -> Any:
    """A dataset of images in columns `image` and `label`."""
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["cat", "dog", "owl"])})
    rows = {"image": [{"bytes": encoded(picture(i)), "path": None} for i in range(count)], "label": [i % 3 for i in range(count)]}
    return hf.Dataset.from_dict(rows, features=features)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved dataset of images with two splits."""
    path = tmp_path / "saved"
    hf.DatasetDict({"train": images(), "test": images(2)}).save_to_disk(path)
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of five words that begins each text with [CLS]."""
    words = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[PAD]", "a", "good", "bad", "film"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A saved dataset of four sentences without splits."""
    path = tmp_path / "texts"
    hf.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0]}).save_to_disk(path)
    return path


def test_images(saved: Path) -> None:
    """The only column of images and the label are found; keys are those of the encoded images; the train split is the default."""
    dataset = opened(f"hf:{saved}")
    assert (len(dataset), dataset.num_classes, dataset.image_shape) == (4, 3, (3, 10, 12))
    assert dataset.labels.tolist() == [0, 1, 2, 0] == [dataset[row][1] for row in range(4)]
    assert np.array_equal(dataset[2][0].permute(1, 2, 0).numpy(), np.asarray(picture(2)))
    assert [key.tobytes() for key in dataset.keys] == [bytes_key(encoded(picture(i))) for i in range(4)]
    assert opened(f"hf:{saved},split=test").keys.tolist() == dataset.keys[:2].tolist()


def test_samples_go_to_other_processes(saved: Path, texts: Path, tokenizer: Path) -> None:
    """A dataset can be sent to a worker that was started afresh."""
    for spec in (f"hf:{saved}", f"hf:{texts},tokenizer={tokenizer},length=4"):
        dataset = opened(spec)
        again = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(again[1][0], dataset[1][0])


def test_splits(saved: Path, texts: Path) -> None:
    """A split that does not exist is refused with those that do; the held-out split is the one that was saved."""
    with pytest.raises(SpecError, match="no split 'val'; there are: train, test"):
        opened(f"hf:{saved},split=val")
    assert str(held_out_split(Spec.parse(f"hf:{saved}"))) == f"hf:{saved},split=test"
    assert held_out_split(Spec.parse(f"hf:{saved},split=test")) is None
    assert held_out_split(Spec.parse(f"hf:{texts}")) is None
    assert held_out_split(Spec.parse("hf:mnist")) is None
    with pytest.raises(SpecError, match="no split 'test'; there is only one: without a name"):
        opened(f"hf:{texts},split=test")


def test_columns_are_chosen(tmp_path: Path) -> None:
    """Where there are several columns of a kind, options say which."""
    both = images().add_column("fine", [3, 2, 1, 0]).cast_column("image", hf.Image())
    both = both.rename_column("label", "coarse").add_column("depth", [{"bytes": encoded(picture(50 + i)), "path": None} for i in range(4)])
    both.cast_column("depth", hf.Image()).save_to_disk(tmp_path / "both")
    with pytest.raises(SpecError, match="expected one column of Image, found 2 among image, coarse, fine, depth; say which: image=COLUMN"):
        opened(f"hf:{tmp_path / 'both'}")
    dataset = opened(f"hf:{tmp_path / 'both'},image=depth,label=fine")
    assert (dataset.labels.tolist(), dataset.num_classes) == ([3, 2, 1, 0], 4)
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), np.asarray(picture(50)))
    for options, message in (
        (",image=fine", "expected images in the column 'fine'"),
        (",image=depht", "no column 'depht', there are: image,"),
    ):
        with pytest.raises(SpecError, match=message):
            opened(f"hf:{tmp_path / 'both'}{options}")


def test_text_is_tokens_of_one_length(texts: Path, tokenizer: Path) -> None:
    """Each text is cut or filled up to `length` int64 tokens, with the special ones; keys follow the tokens."""
    dataset = opened(f"hf:{texts},tokenizer={tokenizer},length=5")
    tokens = [sample.tolist() for sample, _ in (dataset[row] for row in range(4))]
    assert tokens == [[1, 3, 4, 6, 2], [1, 5, 2, 2, 2], [1, 4, 4, 4, 4], [1, 3, 5, 6, 2]]
    assert (dataset[0][0].dtype, dataset.sample_shape, dataset.labels.tolist()) == (torch.int64, (5,), [1, 0, 1, 0])
    assert dataset.keys.tolist() == wrap_dataset([dataset[row] for row in range(4)]).keys.tolist()
    assert opened(f"hf:{texts},tokenizer={tokenizer}").sample_shape == (128,)
    assert opened(f"hf:{texts},tokenizer={tokenizer},length=6").keys[1].tolist() != dataset.keys[1].tolist()
    assert dataset.record().spec == "hf:saved,length=5"


def test_padding_is_the_tokenizers_own(texts: Path, tokenizer: Path) -> None:
    """A tokenizer that says what it pads with is believed; one without any such token pads with 0."""
    made = tokenizers.Tokenizer.from_file(str(tokenizer))
    made.enable_padding(pad_id=6, pad_token="film")  # noqa: S106
    made.save(str(tokenizer))
    assert opened(f"hf:{texts},tokenizer={tokenizer},length=4")[1][0].tolist() == [1, 5, 6, 6]
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0, "bad": 1}, unk_token="x")).save(str(tokenizer))  # noqa: S106
    assert opened(f"hf:{texts},tokenizer={tokenizer},length=3")[1][0].tolist() == [1, 0, 0]


def test_text_options_are_checked(texts: Path, tokenizer: Path) -> None:
    """Text needs a tokenizer, a length and a column of strings; what is missing is named."""
    for options, message in (
        (",text=text", r"say how text becomes tokens: .*,tokenizer=FILE \(a tokenizer.json\)"),
        (f",tokenizer={tokenizer},length=0", "expected length to be a positive whole number, found 0"),
        (f",tokenizer={tokenizer},text=sentence", "no column 'sentence', there are: text, label"),
        (f",tokenizer={texts}/none.json", "no tokenizer at .*none.json, and none on the hub"),
        ("", "expected one column of Image, found 0 among text, label; say which: image=COLUMN; for text: tokenizer=FILE"),
        (",streaming=True", "a streamed dataset can only be iterated over; leave `streaming` out"),
    ):
        with pytest.raises(SpecError, match=message):
            opened(f"hf:{texts}{options}")
    with pytest.raises(UnreadableSampleError, match=r"row 0 cannot be read .it has no text in the column 'label'"):
        _ = opened(f"hf:{texts},tokenizer={tokenizer},text=label").keys


def test_streams_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed dataset that a function gives is refused with the reason."""
    (tmp_path / "streamed.py").write_text("import datasets\nmake = datasets.Dataset.from_dict({'x': [1]}).to_iterable_dataset\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError, match="IterableDataset, which can only be iterated over"):
        opened("py:streamed:make")


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    """An image that cannot be decoded, has no bytes, or lies in a network, is named by its row."""
    rows = [encoded(picture(0)), b"none", None, None]
    paths = [None, None, str(tmp_path / "gone.png"), "https://localhost/x.png"]
    features = hf.Features({"image": hf.Image(), "label": hf.Value("int64")})
    columns = {"image": [{"bytes": row, "path": path} for row, path in zip(rows, paths, strict=True)], "label": [0, 0, 1, 1]}
    (tmp_path / "gone.png").write_bytes(encoded(picture(9)))
    source = hf.Dataset.from_dict(columns, features=features)
    hub = hub_images(source.cast_column("image", hf.Image(decode=False)), "image", np.array([0, 0, 1, 1]), range(2))
    assert np.array_equal(hub[2][0].permute(1, 2, 0).numpy(), np.asarray(picture(9)))
    (tmp_path / "gone.png").unlink()
    for row, message in ((1, "row 1 cannot be read"), (2, "row 2 .*gone.png. cannot be read"), (3, "row 3 .*names no local file")):
        with pytest.raises(UnreadableSampleError, match=message):
            hub[row]


def test_a_name_goes_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a saved folder is loaded by name, here a folder of Parquet files; what cannot be found is a SpecError."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    images().to_parquet(tmp_path / "mine" / "train.parquet")
    assert opened("hf:mine").labels.tolist() == [0, 1, 2, 0]
    with pytest.raises(SpecError, match=r"hf:someone/nothing: .*"):
        opened("hf:someone/nothing")
    with pytest.raises(SpecError, match="there is no folder /nowhere"):
        opened("hf:/nowhere")


def test_a_spec_from_a_file_stays_on_this_machine(saved: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec that a cache names opens what was saved here; it never asks the hub, for a dataset or for a tokenizer."""
    assert len(opened(f"hf:{saved}", trusted=False)) == 4
    monkeypatch.setattr(hf, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(
        SpecError, match="was read from a file and would fetch from a network; if you trust it, type it yourself: --data hf:mnist"
    ):
        opened("hf:mnist", trusted=False)
    (tmp_path / "other").mkdir()
    with pytest.raises(SpecError, match="was read from a file"):
        opened(f"hf:{tmp_path / 'other'}", trusted=False)
    with pytest.raises(SpecError, match=r"there is no file .*bert-base"):
        opened(f"hf:{texts},tokenizer=bert-base", trusted=False)


def test_paths_are_made_absolute(saved: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache names a saved dataset and a tokenizer's file by their absolute paths, and a name on the hub as it is."""
    monkeypatch.chdir(saved.parent)
    found = with_absolute_paths(Spec.parse("hf:saved,tokenizer=tokenizer.json"))
    assert str(found) == f"hf:{saved},tokenizer={tokenizer}"
    assert str(with_absolute_paths(Spec.parse("hf:mnist,tokenizer=bert-base"))) == "hf:mnist,tokenizer=bert-base"
    assert opened(f"hf:{saved}").record().spec == "hf:saved"


def test_the_extra_is_named_where_it_is_missing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, the message says how to install it."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SpecError, match=r"need the package 'datasets': pip install 'kdcache\[hf\]'"):
        opened(f"hf:{saved}")
