"""`csv:` and `parquet:`: rows of tables as samples."""

import hashlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from images_on_disk import encoded, opened, picture

from kdcache.learning.datasets import held_out_split, with_absolute_paths, wrap_dataset
from kdcache.learning.sources.source import bytes_key, sample_key
from kdcache.records.errors import MismatchError, SpecError, UnreadableSampleError
from kdcache.records.specs import Spec

COLUMNS: dict[str, Any] = {
    "width": [1.5, 2.25, -3.0, 4.0],
    "count": [1, 2, 3, 4],
    "is_new": [True, False, True, False],
    "price": [Decimal("1.25"), Decimal("2.50"), Decimal("0.00"), Decimal("9.75")],
    "note": ["a", "b", "c", "d"],
    "label": ["dog", "cat", "dog", "owl"],
}


def write(path: Path, **columns: Any) -> Path:
    """A table as a file of the kind that its name says."""
    table = pa.table(columns)
    if path.suffix == ".csv":
        pacsv.write_csv(table, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    return path


@pytest.fixture(params=["csv", "parquet"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both kinds of table."""
    return str(request.param)


def test_numeric_columns_are_features(kind: str, tmp_path: Path) -> None:
    """All numeric columns but the label are float32 features in their order; strings are classes, sorted; others are passed over."""
    dataset = opened(f"{kind}:{write(tmp_path / f't.{kind}', **COLUMNS)}")
    sample, label = dataset[1]
    assert (sample.dtype, sample.tolist(), label) == (torch.float32, [2.25, 2.0, 0.0, 2.5], 0)
    assert (dataset.num_classes, dataset.labels.tolist(), dataset.sample_shape) == (3, [1, 0, 1, 2], (4,))
    assert dataset.name_of(3) == "row 3"
    with pytest.raises(MismatchError, match=r"expected images, found samples of shape \[4\]"):
        _ = dataset.image_shape


def test_columns_are_chosen(kind: str, tmp_path: Path) -> None:
    """`columns=` says which columns in which order, `label=` where the label is."""
    path = write(tmp_path / f"t.{kind}", **COLUMNS)
    dataset = opened(f"{kind}:{path},columns=count;width,label=note")
    assert (dataset[0][0].tolist(), dataset.labels.tolist()) == ([1.0, 1.5], [0, 1, 2, 3])
    assert opened(f"{kind}:{path},columns=width").sample_shape == (1,)
    assert opened(f"{kind}:{path},columns=('width',)").sample_shape == (1,)


def test_keys_follow_the_values(kind: str, tmp_path: Path) -> None:
    """A key is a digest of a row's features, the same in CSV, Parquet and memory, in any order; the label is no part of it."""
    dataset = opened(f"{kind}:{write(tmp_path / f't.{kind}', **COLUMNS)}")
    turned = {name: values[::-1] for name, values in COLUMNS.items()} | {"label": [0, 1, 2, 3]}
    other = opened(f"parquet:{write(tmp_path / 'turned.parquet', **turned)}")
    assert np.array_equal(other.keys, dataset.keys[::-1])
    assert wrap_dataset([dataset[row] for row in range(4)]).keys.tolist() == dataset.keys.tolist()
    changed = opened(f"{kind}:{write(tmp_path / f'c.{kind}', **COLUMNS | {'count': [1, 2, 3, 5]})}")
    assert np.flatnonzero((changed.keys != dataset.keys).any(axis=1)).tolist() == [3]


def test_equal_bytes_of_another_kind_have_another_key() -> None:
    """Type and shape are part of a key: pixels, features and tokens with equal bytes are different samples."""
    pixels = torch.zeros(8, dtype=torch.uint8)
    kinds = [pixels.reshape(1, 1, 8), pixels.reshape(1, 2, 4), pixels.view(torch.float32), pixels.view(torch.int64)]
    assert len({sample_key(sample) for sample in kinds}) == 4


def test_keys_stay_for_ever() -> None:
    """The keys of known samples are pinned, with the plain definition beside: a cache of today is joined in years to come."""
    for sample, shape in ((torch.tensor([1.5, -2.0]), b"('torch.float32', 2)"), (torch.tensor([1, 2, 3]), b"('torch.int64', 3)")):
        assert sample_key(sample) == hashlib.blake2b(shape + sample.numpy().tobytes(), digest_size=16).digest()
    assert sample_key(torch.tensor([1.5, -2.0])).hex() == "192f78911f1342f71a861f5952e066b1"
    assert bytes_key(b"an encoded image").hex() == "fce9603ae75baf89526bfc2d62ab5402"


@pytest.mark.parametrize(
    ("labels", "options", "expected", "num_classes"),
    [
        ([0, 2, 1, 0], "", [0, 2, 1, 0], 3),
        ([0, 2, 1, 0], ",num_classes=10", [0, 2, 1, 0], 10),
        ([0.0, 2.0, 1.0, 0.0], "", [0, 2, 1, 0], 3),
        ([True, False, True, True], "", [1, 0, 1, 1], 2),
        (["b", "a", "b", "a"], "", [1, 0, 1, 0], 2),
        (["b", "a", "b", "a"], ",classes=z;b;a", [1, 2, 1, 2], 3),
        (pa.array(["b", "a", "b", "a"]).dictionary_encode(), "", [1, 0, 1, 0], 2),
        (pa.array(["b", "a", "b", "a"], pa.large_string()), "", [1, 0, 1, 0], 2),
    ],
)
def test_labels(labels: Any, options: str, expected: list[int], num_classes: int, tmp_path: Path) -> None:
    """Labels are whole numbers or strings; a table that lacks some classes can say which there are."""
    dataset = opened(f"parquet:{write(tmp_path / 't.parquet', x=[1.0, 2, 3, 4], label=labels)}{options}")
    assert (dataset.labels.tolist(), dataset.num_classes) == (expected, num_classes)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, -1, 0], "", r"expected labels from 0 to 1 in the column 'label', found -1 at row 2 \(1 rows in all\)"),
        ([0, 1, 5, 0], ",num_classes=2", r"expected labels from 0 to 1 in the column 'label', found 5 at row 2"),
        ([0, 1, None, 0], "", r"row 2 has no label in the column 'label' \(1 rows in all\)"),
        ([0.0, 0.5, 1.0, 1.0], "", r"expected whole numbers or strings as labels in the column 'label', found double"),
        ([[1], [2], [3], [4]], "", r"expected whole numbers or strings as labels in the column 'label', found list"),
        (["a", "b", "c", "a"], ",classes=a;b", r"expected each of the classes \['a', 'b'\] once, found \['c'\]"),
        (["a", "b", "a", "a"], ",classes=a;b;a", r"expected each of the classes \['a', 'b', 'a'\] once"),
        (["a", "b", "a", "a"], ",num_classes=2", r"holds strings; say which classes there are: classes='a;b;c'"),
        ([0, 1, 1, 0], ",classes=a;b", r"say how many classes there are: num_classes=N"),
        ([0, 1, 1, 0], ",num_classes=0", r"expected num_classes to be a positive whole number, found 0"),
    ],
)
def test_bad_labels_are_refused(labels: Any, options: str, message: str, tmp_path: Path) -> None:
    """A label that is missing or no class is a SpecError that names the row and the option that mends it."""
    path = write(tmp_path / "t.parquet", x=[1.0, 2, 3, 4], label=labels)
    with pytest.raises(SpecError, match=message):
        opened(f"parquet:{path}{options}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (",label=clas", r"expected one column 'clas', found the columns x, empty, far, label; say which: label=COLUMN"),
        (",columns=x;y", r"expected one column 'y', found the columns x, .*; say which: columns=COLUMN"),
        (",columns=empty", r"row 1 has no finite number in the column 'empty' \(2 rows in all\)"),
        (",columns=far", r"row 0 has no finite number in the column 'far' \(1 rows in all\)"),
        (",columns=label,label=x", r"expected numbers in the column 'label', found string"),
        (",image=x", r"expected encoded images \(bytes\) in the column 'x', found double"),
        (",image=x,columns=x", r"expected columns=… or image=…, not both"),
        (",lable=x", r"unknown option lable"),
    ],
)
def test_bad_columns_are_refused(options: str, message: str, tmp_path: Path) -> None:
    """A column that is not there, has no numbers, or has rows without one, is a SpecError that names it."""
    path = write(tmp_path / "t.parquet", x=[1.0, 2, 3], empty=[1.0, None, float("nan")], far=[1e300, 1, 1], label=["a", "b", "a"])
    with pytest.raises(SpecError, match=message):
        opened(f"parquet:{path}{options}")


def test_tables_without_features_are_refused(tmp_path: Path) -> None:
    """A table of which nothing can be a feature says what there is."""
    path = write(tmp_path / "t.csv", name=["a", "b"], label=[0, 1])
    with pytest.raises(SpecError, match=r"no numeric columns to make features of, found name \(string\), label \(int64\); for a column of"):
        opened(f"csv:{path}")


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    """An absent, empty or other file is a SpecError with its path."""
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x00\x01not a table")
    for spec, message in (
        (f"csv:{tmp_path}/none.csv", "there is no file .*none.csv"),
        (f"parquet:{tmp_path}/none", "there is no Parquet file at .*none"),
        (f"parquet:{tmp_path}", "there is no Parquet file at"),
        (f"parquet:{bad}", "cannot be read as Parquet"),
        (f"csv:{bad}", "expected one column 'label'|not a readable CSV"),
    ):
        with pytest.raises(SpecError, match=message):
            opened(spec)
    write(tmp_path / "empty.parquet", x=pa.array([], pa.float32()), label=pa.array([], pa.int64()))
    with pytest.raises(SpecError, match="the dataset is empty"):
        opened(f"parquet:{tmp_path / 'empty.parquet'}")


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    """The files of a folder follow each other by name."""
    write(tmp_path / "t" / "b.parquet", x=[3.0], label=[1])
    write(tmp_path / "t" / "a.parquet", x=[1.0, 2.0], label=[0, 1])
    assert [sample[0].item() for sample in (opened(f"parquet:{tmp_path / 't'}")[row] for row in range(3))] == [1, 2, 3]


@pytest.mark.parametrize("wrapped", [False, True], ids=["bytes", "struct"])
def test_a_column_of_images(wrapped: bool, tmp_path: Path) -> None:
    """`image=` decodes a column of encoded images; their keys are those that the same files have in a folder."""
    files = [encoded(picture(0)), encoded(picture(1), "JPEG"), b"none"]
    column = [{"bytes": file, "path": "x.png"} for file in files] if wrapped else files
    path = write(tmp_path / "t.parquet", picture=column, label=[0, 1, 0])
    dataset = opened(f"parquet:{path},image=picture")
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), np.asarray(picture(0)))
    assert [key.tobytes() for key in dataset.keys] == [bytes_key(file) for file in files]
    with pytest.raises(UnreadableSampleError, match="row 2 cannot be read"):
        dataset[2]
    assert len(opened(f"parquet:{path},image=picture", skip_unreadable=True)) == 2


def test_a_path_in_a_table_is_not_followed(tmp_path: Path) -> None:
    """A row that has the path of an image and no bytes cannot be read: a table does not open files."""
    (tmp_path / "x.png").write_bytes(encoded(picture(0)))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = write(tmp_path / "t.parquet", image=pa.array([{"bytes": None, "path": str(tmp_path / "x.png")}], kind), label=[0])
    with pytest.raises(UnreadableSampleError, match=r"row 0 cannot be read \(it has no bytes\)"):
        _ = opened(f"parquet:{path},image=image").keys


def test_a_table_has_no_place_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe names the options and no path; a cache names the absolute path; a spec from a file may be opened."""
    path = write(tmp_path / "t.csv", **COLUMNS)
    dataset = opened(f"csv:{path},columns=count", trusted=False)
    assert dataset.record().spec == "csv:table,columns=count"
    monkeypatch.chdir(tmp_path)
    assert str(with_absolute_paths(Spec.parse("csv:t.csv,columns=count"))) == f"csv:{path},columns=count"
    assert held_out_split(dataset.spec) is None
