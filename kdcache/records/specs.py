"""Spec strings: `SOURCE:NAME[,key=value]*`, the one way to name a model, a dataset or a codec.

A spec is safe to type in a shell. Values are Python literals, else plain strings. `str(spec)` is canonical (options
sorted by name), so equal specs hash equally.
"""

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from kdcache.records.errors import SpecError

VALUE_KINDS = "None, True, False, a number, a string, or a tuple or list of these"
Value = None | bool | int | float | str | tuple["Value", ...]

_BRACKETS = {"(": 1, "[": 1, ")": -1, "]": -1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A parsed spec string."""

    source: str
    """Where the thing comes from: `torchvision`, `py`, …; empty for kdcache's own (`small`, `fashion-mini`)."""

    name: str
    """What it is called there."""

    options: dict[str, Value] = field(default_factory=dict)
    """Keyword arguments by name."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a spec string.

        Args:
            text: For example `torchvision:resnet50,num_classes=10`.

        Raises:
            SpecError: The name is empty, or an option is not `key=value` or is given twice.
        """
        head, comma, rest = text.strip().partition(",")
        head = head.strip()
        source, colon, name = head.partition(":")
        if not colon or not re.fullmatch(r"[a-z][a-z0-9]*", source):
            source, name = "", head
        if not name:
            raise SpecError(f"the spec {text!r} has no name: expected SOURCE:NAME[,key=value]*, such as 'small'")
        options: dict[str, Value] = {}
        for item in _split_options(rest, text) if comma else ():
            key, equals, value = item.partition("=")
            key = key.strip().replace("-", "_")
            if not equals or not key.isidentifier():
                raise SpecError(f"in the spec {text!r}: expected key=value after the comma, found {item!r}")
            if key in options:
                raise SpecError(f"in the spec {text!r}: the option {key!r} is given twice")
            options[key] = _parse_value(value.strip())
        return cls(source=source, name=name, options=options)

    def __str__(self) -> str:
        head = f"{self.source}:{self.name}" if self.source else self.name
        return ",".join([head, *(f"{key}={_format_value(self.options[key])}" for key in sorted(self.options))])

    def with_options(self, **options: Value) -> Self:
        """The same spec with these options set."""
        return replace(self, options={**self.options, **options})

    def with_defaults(self, **options: Value) -> Self:
        """The same spec with these options set where it has none of its own."""
        return replace(self, options={**options, **self.options})

    def without_options(self, *names: str) -> Self:
        """The same spec without these options."""
        return replace(self, options={key: value for key, value in self.options.items() if key not in names})

    def reject_unknown_options(self, *known: str) -> None:
        """Refuses options that nothing reads.

        Raises:
            SpecError: An option is not among `known`.
        """
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            accepted = ", ".join(sorted(known)) or "none"
            raise SpecError(f"{self}: unknown option {', '.join(unknown)}; {self.name} takes: {accepted}")


def _split_options(rest: str, text: str) -> Iterator[str]:
    """Splits what follows the name at the commas that are outside brackets and quotes."""
    depth, quote, escaped, start = 0, "", False, 0
    for position, character in enumerate(rest):
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in _BRACKETS:
            depth += _BRACKETS[character]
        elif character == "," and depth == 0:
            yield rest[start:position]
            start = position + 1
        if depth < 0:
            break
    if quote or depth:
        raise SpecError(f"in the spec {text!r}: a quote or bracket has no partner; put the value in quotes: key='…'")
    yield rest[start:]


def _parse_value(text: str) -> Value:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return _freeze(value, text)


def _freeze(value: object, text: str) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"the value {text!r} is not finite; expected {VALUE_KINDS}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(_freeze(item, text) for item in value)
    raise SpecError(f"the value {text!r} is of a kind that a spec cannot hold: expected {VALUE_KINDS}")


def _format_value(value: Value) -> str:
    """A string stands without quotes where it would be read as itself."""
    if not isinstance(value, str):
        return _literal(value)
    plain = value and value == value.strip() and not set(value) & set(",()[]{}'\"") and _is_no_literal(value)
    return value if plain else repr(value)


def _literal(value: Value) -> str:
    if not isinstance(value, tuple):
        return repr(value)
    items = [_literal(item) for item in value]
    return f"({items[0]},)" if len(items) == 1 else f"({','.join(items)})"


def _is_no_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return True
    return False
