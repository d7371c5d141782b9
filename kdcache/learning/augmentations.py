"""Augmentations as text: the named ones, a user's own TOML file, and the options that a spec string adds. Nothing here runs them."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from kdcache.records.consistency import LARGEST_ALPHA, SMALLEST_ALPHA
from kdcache.records.errors import SpecError
from kdcache.records.manifest import MixingRecord
from kdcache.records.specs import Spec, Value

PIPELINES = ("none", "crop-flip", "rrc-flip", "randaug", "timm-a3")
"""The augmentations that are known by name; each is a TOML file beside this module."""

OPTIONS = ("size", "mixup", "cutmix", "probability")
"""What a spec string can add to an augmentation."""

MIXING = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, "switch": 0.5}
"""The keys of a `[mix]` table and what they are where it does not say."""

Operation = dict[str, Any]
"""`{"op": NAME, argument: value, …}`, plain JSON data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What an augmentation's text says, sizes filled in."""

    operations: tuple[Operation, ...]
    """What teacher and students share."""
    teacher_end: tuple[Operation, ...]
    """What only the teacher's images go through, afterwards."""
    mixing: MixingRecord | None
    """How two samples become one; None for not at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationListing:
    """One augmentation that `--augment` accepts by name."""

    name: str
    """What to type."""
    summary: str
    """One line."""
    text: str
    """Its TOML."""


def list_augmentations() -> list[AugmentationListing]:
    """The named augmentations."""
    texts = {name: augmentation_text(name) for name in PIPELINES}
    return [AugmentationListing(name=name, summary=text.partition("\n")[0].removeprefix("# "), text=text) for name, text in texts.items()]


def augmentation_text(name: str) -> str:
    """The TOML of a named augmentation: copy it to a file, edit it, and use it as `FILE.toml`.

    Args:
        name: One of `PIPELINES`.

    Raises:
        SpecError: There is none of that name; the nearest names are shown.
    """
    if name not in PIPELINES:
        raise _unknown(name, ", ".join(PIPELINES))
    return resources.files("kdcache.learning").joinpath("pipelines", f"{name}.toml").read_text("utf-8")


def read_augmentation(augment: str, *, image_shape: tuple[int, int, int]) -> Augmentation:
    """An augmentation as plain data that a manifest can hold.

    Args:
        augment: `NAME_OR_FILE[,size=N|HxW][,mixup=A][,cutmix=A][,probability=P]`, with one of `PIPELINES` or a TOML file that has
            `[[ops]]` tables, and may have `[[teacher]]` tables and a `[mix]` table.
        image_shape: Channels, height and width of a decoded sample; `size = "input"` means this height and width, or `size=`.

    Raises:
        SpecError: No such augmentation or file, an unknown option, or the file does not have this form.
    """
    text, spec = _find(augment)
    spec.reject_unknown_options(*OPTIONS)
    tables = _parse(text, spec.name)
    size = read_size(spec.options["size"], f"{spec}, size") if "size" in spec.options else image_shape[1:]
    operations, teacher_end = (tuple(_with_size(tables.get(name, []), list(size))) for name in ("ops", "teacher"))
    if "size" in spec.options and [*operations, *teacher_end] == [*tables["ops"], *tables.get("teacher", [])]:
        raise SpecError(f'{augment}: {spec.name} has no size = "input" that the option size could replace')
    return Augmentation(operations=operations, teacher_end=teacher_end, mixing=_read_mixing(tables.get("mix", {}), spec))


def _find(augment: str) -> tuple[str, Spec]:
    """An augmentation's TOML, and its name with options; a path may hold commas and colons."""
    whole = Spec(source="", name=augment)
    spec = whole if _is_file(augment) else Spec.parse(augment)
    name = f"{spec.source}:{spec.name}" if spec.source else spec.name
    spec = Spec(source="", name=name, options=spec.options)
    if name in PIPELINES:
        return augmentation_text(name), spec
    if not _is_file(name):
        raise _unknown(name, ", ".join([*PIPELINES, "an existing .toml file"]))
    try:
        return Path(name).read_text("utf-8"), spec
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the augmentation {name}: {error}") from error


def _unknown(name: str, known: str) -> SpecError:
    nearest = get_close_matches(name, PIPELINES, n=2)
    return SpecError(f"no augmentation {name!r}; expected one of: {known}" + (f"; did you mean {' or '.join(nearest)}?" if nearest else ""))


def _is_file(name: str) -> bool:
    return Path(name).suffix == ".toml" and Path(name).is_file()


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{name} is not valid TOML: {error}") from error
    lists = [document.get("ops"), document.get("teacher", [])]
    if not set(document) <= {"ops", "teacher", "mix"} or not all(_are_tables(tables) for tables in lists):
        raise SpecError(
            f"{name}: expected [[ops]] tables, each with op = NAME, and at most [[teacher]] tables and a [mix] table beside them,"
            f" found the keys {sorted(document)}"
        )
    _require_plain(document, name)
    return document


def _are_tables(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _require_plain(value: object, name: str) -> None:
    """Refuses what TOML has and JSON has not."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _require_plain(item, name)
    elif not isinstance(value, bool | int | str) and not (isinstance(value, float) and math.isfinite(value)):
        raise SpecError(f"{name}: expected finite numbers, strings, true, false, and lists and tables of these, found {value}")


def _with_size(value: Any, size: list[int]) -> Any:
    """The same data with `"input"` replaced, at any depth."""
    if isinstance(value, dict):
        return {key: _with_size(item, size) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_size(item, size) for item in value]
    return list(size) if value == "input" else value


def read_size(value: object, where: str) -> tuple[int, int]:
    """`160` or `160x192` as height and width in pixels.

    Raises:
        SpecError: It is neither.
    """
    sides = str(value).split("x")
    numbers = [int(side) for side in sides if side.isascii() and side.isdigit() and int(side) > 0]
    if len(numbers) != len(sides) or len(numbers) > 2:
        raise SpecError(f"{where}: expected N or HEIGHTxWIDTH in pixels, found {value!r}")
    return numbers[0], numbers[-1]


def _read_mixing(table: object, spec: Spec) -> MixingRecord | None:
    if not isinstance(table, dict) or set(table) - set(MIXING):
        raise SpecError(f"{spec.name}: expected a [mix] table with the keys {', '.join(MIXING)}, found {table}")
    given: Mapping[str, Any] = {**table, **{key: value for key, value in spec.options.items() if key != "size"}}
    values = {name: _read_number(name, given.get(name, default), spec) for name, default in MIXING.items()}
    if given and not values["mixup"] and not values["cutmix"] and not {"mixup", "cutmix"} & set(given):
        raise SpecError(f"{spec}: {', '.join(given)} without mixup or cutmix mixes nothing; add mixup=0.2 or cutmix=1.0, say")
    is_mixed = values["probability"] > 0 and (values["mixup"] > 0 or values["cutmix"] > 0)
    return MixingRecord(**values) if is_mixed else None


def _read_number(name: str, value: Value, spec: Spec) -> float:
    least, largest = (SMALLEST_ALPHA, LARGEST_ALPHA) if name in ("mixup", "cutmix") else (0.0, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or least <= value <= largest):
        expected = f"0 or a number from {least:g} to {largest:g}" if least else f"a number from 0 to {largest:g}"
        raise SpecError(f"{spec}: expected {name} as {expected}, found {value!r}")
    return float(value)
