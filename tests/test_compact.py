"""What the compact layout promises: every record comes back bit by bit, and bytes that are no such records are refused as such."""

import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import PCodec, Zstd
from numpy.typing import NDArray
from stored import dump_noise, tree

from kdcache.records.errors import FormatError
from kdcache.records.manifest import FieldRecord, Lengths
from kdcache.store.compact_backend import decode_order, decode_records, encode_order, encode_records
from kdcache.store.ranking import ClassOrder
from kdcache.store.streams import PCODEC, ZSTD, decode_stream, encode_stream
from kdcache.workflows.convert import convert

Array = NDArray[Any]
Records = dict[str, Array]


def field(name: str, dtype: str, *inner: int, minus: int | None = None, **attributes: Any) -> FieldRecord:
    """A field of records with made-up axis names; ragged by `logits/count` where `minus` is given."""
    return FieldRecord(
        name=name, dtype=dtype, inner=inner, inner_names=tuple(f"axis{i}" for i in range(len(inner))), attributes=attributes,
        lengths=None if minus is None else Lengths(field="logits/count", minus=minus),
    )  # fmt: skip


def class_dtype(num_classes: int) -> str:
    """The type of `logits/index` for so many classes."""
    return "uint8" if num_classes < 2**8 else "uint16" if num_classes < 2**16 else "uint32"


def classes(rng: np.random.Generator, num_classes: int, lengths: Sequence[int]) -> Array:
    """Different classes for each record, the low ones more often, one record behind the other."""
    most = min(num_classes, 4 * max(lengths))
    return np.concatenate([rng.permutation(most if rng.random() < 0.8 else num_classes)[:length] for length in lengths])


def falls(rng: np.random.Generator, count: int) -> Array:
    """Codes of falls: mostly small ones."""
    return np.minimum(rng.geometric(0.1, count) - 1, 254).astype(np.uint8)


def kept(
    rng: np.random.Generator, num_rows: int, num_classes: int, k: int, positions: tuple[int, ...]
) -> tuple[list[FieldRecord], Records]:
    """Records as `topk` makes them, without falls where one class is kept."""
    items, shape = num_rows * int(np.prod(positions)), (num_rows, *positions)
    fields = [field("logits/index", class_dtype(num_classes), *positions, k, num_classes=num_classes)]
    records = {"logits/index": classes(rng, num_classes, [k] * items).reshape(*shape, k).astype(fields[0].dtype)}
    if k > 1:
        fields.append(field("logits/gap", "uint8", *positions, k - 1))
        records["logits/gap"] = falls(rng, items * (k - 1)).reshape(*shape, k - 1)
    fields.append(field("logits/tail", "uint8", *positions, 3))
    records["logits/tail"] = falls(rng, items * 3).reshape(*shape, 3)
    return fields, records


def ragged(
    rng: np.random.Generator, num_rows: int, num_classes: int, most: int, positions: tuple[int, ...], *, drawn: bool
) -> tuple[list[FieldRecord], Records]:
    """Records as `sampled` makes them, or as `adaptive`, without falls where one class is kept at most."""
    items, shape = num_rows * int(np.prod(positions)), (num_rows, *positions)
    counts, room = rng.integers(1, most + 1, items), int(np.prod(positions))
    total = int(counts.sum())
    fields = [
        field("logits/count", "uint8", *positions),
        field("logits/index", class_dtype(num_classes), room * most, minus=0, num_classes=num_classes),
    ]
    records = {
        "logits/count": counts.reshape(shape).astype(np.uint8),
        "logits/index": classes(rng, num_classes, counts.tolist()).astype(fields[1].dtype),
    }
    if drawn:
        return [*fields, field("logits/hits", "uint16", room * most, minus=0)], records | {
            "logits/hits": rng.integers(1, 1000, total).astype(np.uint16)
        }
    if most > 1:
        fields.append(field("logits/gap", "uint8", room * (most - 1), minus=1))
        records["logits/gap"] = falls(rng, total - items)
    fields.append(field("logits/tail", "uint8", *positions, 3))
    return fields, records | {"logits/tail": falls(rng, items * 3).reshape(*shape, 3)}


def whole(rng: np.random.Generator, num_rows: int, num_classes: int) -> tuple[list[FieldRecord], Records]:
    """Records as `dense` makes them, with any bits."""
    fields = [field("logits/value", "float16", num_classes), field("logits/scale", "float32"), field("logits/code", "uint64", 2, 70)]
    shapes = [(num_rows, *item.inner) for item in fields]
    return fields, {
        item.name: np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(item.dtype).itemsize), item.dtype).reshape(shape)
        for item, shape in zip(fields, shapes, strict=True)
    }


def orders(rng: np.random.Generator, num_classes: int) -> ClassOrder:
    """By a profile for few classes, by how often each comes for many."""
    if num_classes > 300:
        return ClassOrder.from_counts(rng.integers(0, 5, num_classes))
    return ClassOrder.from_profile(-rng.integers(0, 9, (num_classes, num_classes)).astype(np.float16))


def assert_same(found: Records, expected: Records) -> None:
    """The same fields, types, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), num_rows=st.integers(1, 300), num_classes=st.sampled_from([2, 3, 17, 255, 256, 1000, 65_535, 70_000]),
    k=st.sampled_from([1, 2, 5, 18, 64, 65]), positions=st.sampled_from([(), (1,), (2, 3)]), kind=st.sampled_from(["topk", "adaptive", "sampled"]),
    is_ordered=st.booleans(),
)  # fmt: skip
def test_records_come_back(
    seed: int, num_rows: int, num_classes: int, k: int, positions: tuple[int, ...], kind: str, is_ordered: bool
) -> None:
    """Records of any codec that keeps some classes come back bit by bit, with an order of classes and without."""
    rng, k = np.random.default_rng(seed), min(k, num_classes)
    if kind == "topk":
        fields, records = kept(rng, num_rows, num_classes, k, positions)
    else:
        fields, records = ragged(rng, num_rows, num_classes, k, positions, drawn=kind == "sampled")
    order = orders(rng, num_classes) if is_ordered else None
    assert_same(decode_records(encode_records(records, fields, order), fields, order, num_rows), records)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 300), num_classes=st.integers(2, 100))
def test_floats_come_back(seed: int, num_rows: int, num_classes: int) -> None:
    """Floats of any bits come back, NaN with their payloads, and whole numbers of 64 bits."""
    fields, records = whole(np.random.default_rng(seed), num_rows, num_classes)
    assert_same(decode_records(encode_records(records, fields, None), fields, None, num_rows), records)


def related(num_rows: int, k: int, *, is_ragged: bool) -> tuple[list[FieldRecord], Records]:
    """Records whose masses follow from their falls, and enough to see it."""
    rng = np.random.default_rng(3)
    if is_ragged:
        fields, records = ragged(rng, num_rows, 50, k, (), drawn=False)
        level = 250 - 10 * records["logits/count"].astype(int)
    else:
        fields, records = kept(rng, num_rows, 50, k, ())
        level = 220 - records["logits/gap"].astype(int).sum(axis=1) // 4
    masses = np.clip(level[:, None] + [0, 8, 15] + rng.integers(-2, 3, (num_rows, 3)), 0, 254)
    return fields, records | {"logits/tail": masses.astype(np.uint8)}


@pytest.mark.parametrize("k", [2, 4, 20])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_predicted_masses_come_back(k: int, is_ragged: bool) -> None:
    """Masses of many records are predicted, which makes their streams smaller, and come back exactly."""
    fields, records = related(3000, k, is_ragged=is_ragged)
    data, order = encode_records(records, fields, None), orders(np.random.default_rng(0), 50)
    assert all(header_of(data)["logits/tail"]["weights"])
    assert_same(decode_records(data, fields, None, 3000), records)
    assert_same(decode_records(encode_records(records, fields, order), fields, order, 3000), records)
    plain = [len(encode_stream(column)[1]) for column in records["logits/tail"].T]
    assert sum(size for _, size in header_of(data)["logits/tail"]["streams"]) < sum(plain)


def test_many_temperatures_come_back() -> None:
    """Masses at more temperatures than are coded place by place are not predicted, and come back."""
    fields, records = kept(np.random.default_rng(0), 2500, 50, 5, ())
    fields[-1] = field("logits/tail", "uint8", 65)
    records["logits/tail"] = falls(np.random.default_rng(1), 2500 * 65).reshape(2500, 65)
    assert_same(decode_records(encode_records(records, fields, None), fields, None, 2500), records)


@pytest.mark.parametrize("seen", [[], [4], [3, 0, 299, 7]])
def test_order_comes_back(seen: list[int]) -> None:
    """The order of classes is those that come, as they were given, and then all others."""
    index = field("logits/index", "uint16", 5, num_classes=300)
    order = decode_order(encode_order(np.array(seen, np.uint32)), index).order
    np.testing.assert_array_equal(order, [[*seen, *(c for c in range(300) if c not in seen)]])


# Hostile bytes: the checksum is right, the rest is not.


def header_of(data: bytes) -> Any:
    """The header of a file."""
    return json.loads(data[8 : 8 + int.from_bytes(data[4:8], "little")])


def resealed(body: bytes) -> bytes:
    """A file with this content and the checksum that belongs to it."""
    return body + google_crc32c.value(body).to_bytes(4, "little")


def with_header(data: bytes, header: Any) -> bytes:
    """A file with another header before the same streams; text stands for itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return resealed(data[:4] + len(text).to_bytes(4, "little") + text + data[8 + int.from_bytes(data[4:8], "little") : -4])


def small(*, is_ragged: bool) -> tuple[list[FieldRecord], Records, ClassOrder]:
    """A few records, and the order of their classes."""
    rng = np.random.default_rng(5)
    fields, records = ragged(rng, 12, 40, 4, (2,), drawn=False) if is_ragged else kept(rng, 12, 40, 4, (2,))
    return fields, records, orders(rng, 40)


def refused_or_well_formed(data: bytes, fields: Sequence[FieldRecord], order: ClassOrder | None, num_rows: int) -> bool:
    """Whether a file is refused; what is read from it otherwise has the types and shapes of its fields."""
    try:
        records = decode_records(data, fields, order, num_rows)
    except FormatError:
        return True
    for item in fields:
        shape = (num_rows, *item.inner)
        if item.lengths:
            shape = (int((records["logits/count"].astype(int) - item.lengths.minus).sum()),)
        assert (records[item.name].dtype, records[item.name].shape) == (np.dtype(item.dtype), shape)
    return False


@pytest.mark.parametrize("is_ragged", [False, True])
def test_truncated_file_is_refused(is_ragged: bool) -> None:
    """A file that ends early is a FormatError, whether its checksum was made anew or not."""
    fields, records, order = small(is_ragged=is_ragged)
    data = encode_records(records, fields, order)
    for length in range(len(data)):
        assert refused_or_well_formed(data[:length], fields, order, 12)
    for length in range(len(data) - 4):
        assert refused_or_well_formed(resealed(data[:length]), fields, order, 12)


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("is_predicted", [False, True])
def test_changed_file_is_refused_or_well_formed(is_ragged: bool, is_predicted: bool) -> None:
    """A file with other bytes and a right checksum is a FormatError, or records of the right types and shapes."""
    fields, records, order = small(is_ragged=is_ragged)
    num_rows = 12
    if is_predicted:
        (fields, records), order, num_rows = related(2100, 3, is_ragged=is_ragged), orders(np.random.default_rng(0), 50), 2100
    data, rng, refused = encode_records(records, fields, order), np.random.default_rng(6), 0
    end_of_header = 8 + int.from_bytes(data[4:8], "little")
    for attempt in range(300):
        changed = bytearray(data[:-4])
        for _ in range(1 + attempt % 3):
            changed[rng.integers(8, end_of_header) if attempt % 2 else rng.integers(len(changed))] = rng.integers(256)
        refused += refused_or_well_formed(resealed(bytes(changed)), fields, order, num_rows)
    assert refused > 100


def changed_entry(name: str, **entry: Any) -> Callable[[Any], Any]:
    """Changes what a header says of one field."""
    return lambda header: {**header, name: {**header[name], **entry}}


BAD_HEADERS: dict[str, Callable[[Any], Any]] = {
    "no JSON": lambda _: b"{",
    "no text": lambda _: b"\xff\xfe{",
    "too deep": lambda _: b"[" * 100_000,
    "too large a number": lambda _: b"9" * 10_000,
    "a list": lambda _: [],
    "a text": lambda _: "",
    "nothing": lambda _: None,
    "no fields": lambda _: {},
    "a field too few": lambda header: {name: header[name] for name in header if name != "logits/gap"},
    "a field too many": lambda header: {**header, "logits/more": {"dtype": "uint8", "inner": [], "streams": []}},
    "fields as lists": lambda header: {name: [] for name in header},
    "another type": changed_entry("logits/gap", dtype="uint16"),
    "an unknown type": changed_entry("logits/gap", dtype="object"),
    "another shape": changed_entry("logits/gap", inner=[10**12]),
    "no streams": changed_entry("logits/gap", streams=[]),
    "streams of nothing": changed_entry("logits/gap", streams=None),
    "streams without a length": changed_entry("logits/gap", streams=[["zstd"]]),
    "a huge stream": changed_entry("logits/gap", streams=[["zstd", 2**70]]),
    "a negative stream": lambda header: changed_entry("logits/gap", streams=[["zstd", -5], *header["logits/gap"]["streams"]])(header),
    "a fraction of a byte": changed_entry("logits/gap", streams=[["zstd", 1.5]]),
    "yes for a length": changed_entry("logits/gap", streams=[["zstd", True]]),
    "empty streams": lambda header: {name: {**header[name], "streams": [["zstd", 0]] * 3} for name in header},
    "an unknown coder": lambda header: {
        name: {**header[name], "streams": [["pickle", size] for _, size in header[name]["streams"]]} for name in header
    },
    "a list for a coder": lambda header: {
        name: {**header[name], "streams": [[[], size] for _, size in header[name]["streams"]]} for name in header
    },
    "no weights": lambda header: {**header, "logits/tail": {k: v for k, v in header["logits/tail"].items() if k != "weights"}},
    "weights of too few": changed_entry("logits/tail", weights=[[]]),
    "a number for weights": changed_entry("logits/tail", weights=[1, 1, 1]),
    "nothing for weights": changed_entry("logits/tail", weights=[None, None, None]),
    "an object for weights": changed_entry("logits/tail", weights={"0": []}),
    "too many weights": changed_entry("logits/tail", weights=[[], [], [0] * 100_000]),
    "texts for weights": changed_entry("logits/tail", weights=[[], [], ["0"] * 7]),
    "fractions for weights": changed_entry("logits/tail", weights=[[], [], [0.5] * 7]),
    "huge weights": changed_entry("logits/tail", weights=[[], [], [2**62] * 7]),
}


@pytest.mark.parametrize("change", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header_is_refused(change: Callable[[Any], Any]) -> None:
    """A header that is none, or promises what is not there, is a FormatError, and takes no more memory than its bytes."""
    fields, records, order = small(is_ragged=False)
    data = encode_records(records, fields, order)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError):
        decode_records(with_header(data, change(header_of(data))), fields, order, 12)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"count": 2**50}, id="too many"),
        pytest.param({"count": -1}, id="fewer than none"),
        pytest.param({"count": 3}, id="fewer than there are"),
        pytest.param({"count": 5}, id="more than there are"),
        pytest.param({"count": True}, id="no number"),
        pytest.param({"count": None}, id="nothing"),
        pytest.param({"streams": []}, id="no stream"),
    ],
)
def test_bad_order_is_refused(change: dict[str, Any]) -> None:
    """An order of classes with another number of them than it has is a FormatError."""
    data, index = encode_order(np.array([3, 0, 299, 7], np.uint32)), field("logits/index", "uint16", 5, num_classes=300)
    with pytest.raises(FormatError):
        decode_order(with_header(data, changed_entry("order", **change)(header_of(data))), index)


@pytest.mark.parametrize("seen", [[1, 1], [300], [2**32 - 1]])
def test_order_of_other_classes_is_refused(seen: list[int]) -> None:
    """An order with a class twice, or one that the store does not have, is a FormatError."""
    with pytest.raises(FormatError, match="different classes below 300"):
        decode_order(encode_order(np.array(seen, np.uint32)), field("logits/index", "uint16", 5, num_classes=300))


def test_changed_order_is_refused_or_an_order() -> None:
    """An order of classes with other bytes and a right checksum is a FormatError, or has every class once."""
    data, index = encode_order(np.random.default_rng(0).permutation(300)[:90].astype(np.uint32)), field("i", "uint16", 5, num_classes=300)
    rng = np.random.default_rng(1)
    for _ in range(300):
        changed = bytearray(data[:-4])
        changed[rng.integers(len(changed))] = rng.integers(256)
        try:
            order = decode_order(resealed(bytes(changed)), index).order
        except FormatError:
            continue
        np.testing.assert_array_equal(np.sort(order[0]), range(300))


@pytest.mark.parametrize("coder", [ZSTD, PCODEC])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_stream_of_another_length_is_refused(coder: str, dtype: str) -> None:
    """A stream that has fewer or more numbers than are asked for is a FormatError, never padded or cut."""
    values = np.arange(200, dtype=dtype)
    data = bytes(Zstd().encode(values) if coder == ZSTD else PCodec().encode(values.astype("uint16") if dtype == "uint8" else values))
    np.testing.assert_array_equal(decode_stream(coder, data, np.dtype(dtype), len(values)), values)
    for count in (0, 1, len(values) - 1, len(values) + 1, 2**20):
        with pytest.raises(FormatError):
            decode_stream(coder, data, np.dtype(dtype), count)


def test_number_beyond_its_type_is_refused() -> None:
    """A widened stream with a number of more than a byte is a FormatError for a field of bytes."""
    coder, data = encode_stream(np.arange(100, 400, dtype=np.uint16))
    assert coder == PCODEC
    with pytest.raises(FormatError, match="too large"):
        decode_stream(coder, data, np.dtype("uint8"), 300)


def test_stream_that_unpacks_to_gigabytes_is_refused() -> None:
    """A small stream of many zeros where few numbers are expected is a FormatError before it is unpacked."""
    bomb = bytes(Zstd(level=1).encode(np.zeros(2**28, np.uint8)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (bomb, bomb[:4] + b"\x00" + bomb[5:], bomb[:5], b""):
        with pytest.raises(FormatError):
            decode_stream(ZSTD, data, np.dtype("uint8"), 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def test_counts_beyond_the_most_are_refused() -> None:
    """Counts of more entries than a field can have are a FormatError before anything is made for them."""
    fields, records, order = small(is_ragged=True)
    data = encode_records(records, fields, order)
    fewer = [item if item.name != "logits/index" else replace(item, inner=(4,)) for item in fields]
    header = changed_entry("logits/index", inner=[4])(header_of(data))
    with pytest.raises(FormatError, match="expected counts"):
        decode_records(with_header(data, header), fewer, order, 12)


def test_place_beyond_the_order_is_refused() -> None:
    """Places that no class has are a FormatError."""
    fields, records, order = small(is_ragged=False)
    data = encode_records(records, fields, order)
    with pytest.raises(FormatError, match="expected classes below 9"):
        decode_records(data, fields, orders(np.random.default_rng(0), 9), 12)


@pytest.mark.parametrize(
    "spec", ["topk,k=5,profile=False", "adaptive,mean_k=4,max_k=20,profile=False", "sampled,draws=20", "topk,k=1,profile=False"]
)
def test_store_without_a_profile_packs_and_unpacks(spec: str, tmp_path: Path) -> None:
    """A store that keeps no profile takes the order of classes from its records, and unpacks to the same files."""
    source = dump_noise(tmp_path, codec=spec, num_classes=300).path
    convert(source, tmp_path / "packed", layout="compact")
    assert (tmp_path / "packed/shared/order.kdc").is_file()
    convert(tmp_path / "packed", tmp_path / "unpacked", layout="zarr")
    assert tree(tmp_path / "unpacked") == tree(source)
