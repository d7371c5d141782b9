"""Frozen dataclasses to JSON and back, with every type checked on the way in: what is read may be hostile."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from kdcache.records.errors import FormatError

Record = TypeVar("Record")


def optional(default: Any) -> Any:
    """A dataclass field that is left out of the JSON where it has its default.

    So records of earlier minor versions, and the digests of them, stay as they were.
    """
    return dataclasses.field(default=default, metadata={"optional": True})


def to_json(record: Any) -> Any:
    """A record as plain JSON data: dataclasses become objects, tuples become arrays."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        items = [(item, getattr(record, item.name)) for item in dataclasses.fields(record)]
        return {item.name: to_json(value) for item, value in items if not (item.metadata.get("optional") and value == item.default)}
    if isinstance(record, Mapping):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [to_json(value) for value in record]
    return record


def from_json(kind: type[Record], document: object, *, where: str) -> Record:
    """Reads a record of type `kind`.

    Args:
        kind: A dataclass whose fields are numbers, strings, None, other records, and tuples and dicts of these.
        document: Parsed JSON. Keys that the dataclass does not have are left out: a later minor version may add some.
        where: What is being read, for messages.

    Raises:
        FormatError: A key is missing or a value has another type.
    """
    return typing.cast(Record, _read(kind, document, where))


def _read(kind: Any, value: object, where: str) -> object:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _read_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is dict:
        entries = _expect(dict, value, where)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in entries.items()}
    if kind is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    return _expect(type(None) if kind is None else kind, value, where)


def _read_union(members: tuple[Any, ...], value: object, where: str) -> object:
    for member in members:
        try:
            return _read(member, value, where)
        except FormatError:
            continue
    raise FormatError(f"{where}: expected one of {members}, found {_shown(value)}")


def _read_dataclass(kind: Any, value: object, where: str) -> object:
    entries = _expect(dict, value, where)
    hints = typing.get_type_hints(kind)
    values = {}
    for item in dataclasses.fields(kind):
        if item.name in entries:
            values[item.name] = _read(hints[item.name], entries[item.name], f"{where}.{item.name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise FormatError(f"{where}: the key {item.name!r} is missing")
    return kind(**values)


def _read_tuple(arguments: tuple[Any, ...], value: object, where: str) -> tuple[object, ...]:
    items = _expect(list, value, where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if len(items) != len(arguments):
        raise FormatError(f"{where}: expected {len(arguments)} items, found {len(items)}")
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(arguments, items, strict=True)))


def _expect(kind: Any, value: object, where: str) -> Any:
    if type(value) is not kind:
        raise FormatError(f"{where}: expected {kind.__name__}, found {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
