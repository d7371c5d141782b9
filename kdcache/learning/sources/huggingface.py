"""`hf:NAME`: map-style datasets of Hugging Face, images or text; by name, or from a folder that `save_to_disk` wrote."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdcache.learning.sources.encoded import EncodedImages
from kdcache.learning.sources.images import unreadable
from kdcache.learning.sources.labels import LABEL_OPTIONS, read_labels
from kdcache.learning.sources.source import Keys, Labels, Rows, as_keys, sample_key
from kdcache.records.errors import SpecError
from kdcache.records.specs import Spec

SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves: the one for a set of splits, the other for one of them."""

PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
"""What fills a short text up where the tokenizer does not say it; a tokenizer without any of them pads with token 0."""

DEFAULT_LENGTH = 128
ROWS_AT_A_TIME = 1024


def hub_images(dataset: Any, column: str, labels: Labels, classes: object) -> EncodedImages:
    """A column of images, not decoded by the dataset.

    Args:
        dataset: The rows.
        column: Which column.
        labels: Their labels, [rows].
        classes: Names or numbers of the classes.
    """
    return EncodedImages(partial(_encoded, dataset, column), labels, classes)


def _encoded(dataset: Any, column: str, row: int) -> bytes:
    """The encoded image: from the dataset itself, or from the local file that it names."""
    image = dataset[row][column] or {}
    if image.get("bytes"):
        return bytes(image["bytes"])
    path = image.get("path")
    if not path or "://" in path:
        raise unreadable(f"row {row}", "it has no bytes and names no local file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(f"row {row} ({path})", error.strerror or error) from error


class HubTexts:
    """A column of texts as tokens: cut or filled up to one length.

    Args:
        dataset: The rows.
        column: Which column.
        labels: Their labels, [rows].
        classes: Names or numbers of the classes.
        tokenizer: Gives the tokens, with the special ones that it adds.
        length: Tokens of a sample.
    """

    def __init__(self, dataset: Any, column: str, labels: Labels, classes: object, *, tokenizer: Any, length: int) -> None:
        self._dataset, self._column, self._labels, self.classes = dataset, column, labels, classes
        padding = tokenizer.padding
        known = [token for token in map(tokenizer.token_to_id, PAD_TOKENS) if token is not None]
        self._pad = padding["pad_id"] if padding else next(iter(known), 0)
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        self._tokenizer, self._length = tokenizer, length

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._tokens([index])[0], int(self._labels[index])

    def sample_keys(self, rows: Rows) -> Keys:
        """Keys of the tokens, as of any decoded sample: another tokenizer or length gives other ones."""
        batches = (rows[start : start + ROWS_AT_A_TIME].tolist() for start in range(0, len(rows), ROWS_AT_A_TIME))
        return as_keys([sample_key(tokens) for batch in batches for tokens in self._tokens(batch)])

    def sample_labels(self, rows: Rows) -> Labels:
        """The labels of some rows."""
        labels: Labels = self._labels[rows]
        return labels

    def sample_name(self, row: int) -> None:  # noqa: ARG002
        """None: a sample is known by its row."""
        return

    def _tokens(self, rows: list[int]) -> list[Tensor]:
        texts = self._dataset[rows][self._column]
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                raise unreadable(f"row {row}", f"it has no text in the column {self._column!r}")
        filled = [encoded.ids + [self._pad] * (self._length - len(encoded.ids)) for encoded in self._tokenizer.encode_batch(texts)]
        return list(torch.tensor(filled, dtype=torch.int64))


def open_huggingface(spec: Spec, *, trusted: bool) -> EncodedImages | HubTexts:
    """Opens a dataset of Hugging Face.

    Args:
        spec: `hf:NAME` or `hf:/FOLDER`, with `config=NAME`, `split=NAME` (by default `train`), `label=COLUMN`, and for images
            `image=COLUMN`, for text `text=COLUMN,tokenizer=FILE,length=128`; columns are found where there is but one choice.
        trusted: Whether the user typed the spec. One that was read from a file opens only what `save_to_disk` wrote on this
            machine: no network, no code.

    Raises:
        SpecError: No such dataset, split or column, or it can only be iterated over.
    """
    spec.reject_unknown_options(*LABEL_OPTIONS, "config", "image", "length", "split", "streaming", "text", "tokenizer")
    if spec.options.get("streaming"):
        raise SpecError(
            f"{spec}: kdcache draws samples in any order, and a streamed dataset can only be iterated over; leave `streaming` out"
        )
    dataset = _load(spec, _require("datasets"), trusted=trusted)
    label = _label_column(spec, dataset)
    if "text" in spec.options or "tokenizer" in spec.options:
        labels, classes = _labels(spec, dataset, label)
        tokenizer = _tokenizer(spec, trusted=trusted)
        return HubTexts(dataset, _column(spec, dataset, "text"), labels, classes, tokenizer=tokenizer, length=_length(spec))
    image = _image_column(spec, dataset)
    labels, classes = _labels(spec, dataset, label)
    images = dataset.select_columns([image]).cast_column(image, _require("datasets").Image(decode=False))
    return hub_images(images, image, labels, classes)


def is_saved(spec: Spec) -> bool:
    """Whether the spec names a folder that `save_to_disk` wrote."""
    return any((local_path(spec) / name).is_file() for name in SAVED)


def local_path(spec: Spec) -> Path:
    """The spec's name as a path."""
    return Path(spec.name).expanduser()


def held_out_saved(spec: Spec) -> Spec | None:
    """The held-out split beside the training split of a saved dataset; None for others: `--eval-data` names it."""
    if spec.options.get("split", "train") != "train":
        return None
    return next(
        (spec.with_options(split=name) for name in ("test", "validation") if (local_path(spec) / name / "state.json").is_file()), None
    )


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpecError(f"hf: datasets need the package {module!r}: pip install 'kdcache[hf]'") from error


def _load(spec: Spec, library: Any, *, trusted: bool) -> Any:
    """The rows of one split."""
    split, path = str(spec.options.get("split", "train")), local_path(spec)
    if not trusted and not is_saved(spec):
        raise SpecError(f"{spec} was read from a file and would fetch from a network; if you trust it, type it yourself: --data {spec}")
    if spec.name.startswith(("/", ".", "~")) and not path.is_dir():
        raise SpecError(f"{spec}: there is no folder {path.absolute()}")
    try:
        loaded = library.load_from_disk(str(path)) if is_saved(spec) else library.load_dataset(spec.name, spec.options.get("config"))
    except Exception as error:  # the library raises almost anything: files, JSON, Arrow, network
        raise SpecError(f"{spec}: {type(error).__name__}: {error}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise SpecError(f"{spec}: no split {split!r}; there are: {', '.join(loaded)}")
        loaded = loaded[split]
    elif "split" in spec.options and str(loaded.split) != split:
        raise SpecError(f"{spec}: no split {split!r}; there is only one: {loaded.split or 'without a name'}")
    return loaded.with_format(None)


def _label_column(spec: Spec, dataset: Any) -> str:
    if "label" in spec.options or "label" in dataset.column_names:
        return _column(spec, dataset, "label")
    return _only(spec, dataset, "ClassLabel", option="label")


def _image_column(spec: Spec, dataset: Any) -> str:
    if "image" not in spec.options:
        return _only(spec, dataset, "Image", option="image")
    name = _column(spec, dataset, "image")
    if type(dataset.features[name]).__name__ != "Image":
        raise SpecError(f"{spec}: expected images in the column {name!r}, found {dataset.features[name]}")
    return name


def _only(spec: Spec, dataset: Any, kind: str, *, option: str) -> str:
    """The only column of a kind."""
    names = [name for name, feature in dataset.features.items() if type(feature).__name__ == kind]
    if len(names) != 1:
        columns = ", ".join(dataset.column_names)
        text = "; for text: tokenizer=FILE" if option == "image" else ""
        raise SpecError(f"{spec}: expected one column of {kind}, found {len(names)} among {columns}; say which: {option}=COLUMN{text}")
    return str(names[0])


def _column(spec: Spec, dataset: Any, option: str) -> str:
    name = str(spec.options.get(option, option))
    if name not in dataset.column_names:
        raise SpecError(f"{spec}: no column {name!r}, there are: {', '.join(dataset.column_names)}; say which: {option}=COLUMN")
    return name


def _labels(spec: Spec, dataset: Any, column: str) -> tuple[Labels, object]:
    names = getattr(dataset.features[column], "names", None)
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    if names is not None and not {"classes", "num_classes"} & set(spec.options) and not values.null_count:
        labels: Labels = values.cast(pa.int64()).to_numpy().astype(np.int64)
        return labels, names
    return read_labels(spec, values, name=column)


def _tokenizer(spec: Spec, *, trusted: bool) -> Any:
    library, name = _require("tokenizers"), spec.options.get("tokenizer")
    if name is None:
        raise SpecError(f"{spec}: say how text becomes tokens: {spec},tokenizer=FILE (a tokenizer.json), or the name of one on the hub")
    path = Path(str(name)).expanduser()
    try:
        if path.is_file():
            return library.Tokenizer.from_file(str(path))
        if not trusted:
            raise FileNotFoundError(f"there is no file {path.absolute()}")
        return library.Tokenizer.from_pretrained(str(name))
    except Exception as error:  # the library raises plain Exception
        raise SpecError(f"{spec}: no tokenizer at {path.absolute()}, and none on the hub: {error}") from error


def _length(spec: Spec) -> int:
    length = spec.options.get("length", DEFAULT_LENGTH)
    if not isinstance(length, int) or length < 1:
        raise SpecError(f"{spec}: expected length to be a positive whole number, found {length!r}")
    return length
