"""Augmentations by name, by file and with options, and the command that shows them."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import kdcache, kdcache_json
from replaying import noise_image
from torchvision.transforms import v2

from kdcache.learning.augmentations import PIPELINES, augmentation_text, list_augmentations, read_augmentation
from kdcache.learning.operations import End
from kdcache.learning.views import SeededViews, make_views
from kdcache.records.errors import SpecError
from kdcache.records.manifest import MixingRecord

SHAPE = (3, 20, 24)
FILE = """
[[ops]]
op = "RandomApply"
p = 0.5
transforms = [{ op = "RandomResizedCrop", size = "input" }, { op = "ColorJitter", hue = 0.1 }]
[[ops]]
op = "Resize"
size = "input"
"""
WITH_TEACHER = FILE + '[[teacher]]\nop = "Resize"\nsize = [40, 48]\n[[teacher]]\nop = "CenterCrop"\nsize = 32\n'


def make(augment: str, shape: tuple[int, int, int] = SHAPE) -> SeededViews:
    """The views of an augmentation."""
    return make_views(augment, seed=0, image_shape=shape)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of one's own with nested operations and a teacher's end; its path has a comma and a colon."""
    path = tmp_path / "a,b:c.toml"
    path.write_text(WITH_TEACHER)
    return path


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 24)])
def test_a_copy_is_the_same_augmentation(name: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """The text of a named augmentation, written to a file, makes the same record: it can be copied and edited."""
    copy = tmp_path / "copy.toml"
    copy.write_text(augmentation_text(name))
    views = make(name, shape)
    assert make(str(copy), shape).record == views.record
    assert views.output_shape(shape) == shape
    assert views(noise_image(shape=shape), b"k" * 16, 0).shape == shape


def test_named_augmentations_have_summaries() -> None:
    """Each named augmentation says in its first line what it is."""
    listings = list_augmentations()
    assert [listing.name for listing in listings] == list(PIPELINES)
    assert all(listing.text.startswith(f"# {listing.summary}\n") and listing.summary.endswith(".") for listing in listings)


def test_timm_a3_mixes_and_draws_magnitudes() -> None:
    """Procedure A3: MixUp 0.1, CutMix 1.0, one of them for each view, and two operations around magnitude 6 of 10."""
    record = make("timm-a3,size=160", (3, 90, 70)).record
    assert record.mixing == MixingRecord(mixup=0.1, cutmix=1.0, probability=1.0, switch=0.5)
    assert record.pipeline[0]["size"] == [160, 160]
    choices = [op["transforms"][0] for op in record.pipeline if op["op"] == "RandomApply"]
    assert len(choices) == 2
    for choice in choices:
        weights = torch.tensor(choice["p"]) / sum(choice["p"])
        magnitudes = torch.tensor([op["magnitude"] for op in choice["transforms"]]) / 3.0
        mean = float((weights * magnitudes).sum())
        assert mean == pytest.approx(6)
        assert float((weights * (magnitudes - mean) ** 2).sum()) ** 0.5 == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(("option", "size"), [("size=14", [14, 14]), ("size=16x12", [16, 12]), ("size='8x9'", [8, 9])])
def test_size_replaces_input(option: str, size: list[int], file: Path) -> None:
    """`size=` stands for the images' own size wherever the file says "input", also in nested operations."""
    for name in ("crop-flip", "rrc-flip", "randaug"):
        views = make(f"{name},{option}", (3, 40, 30))
        assert views.record.pipeline[0]["size"] == size
        assert views.output_shape((3, 40, 30)) == (3, *size)
    nested, last = read_augmentation(str(file), image_shape=SHAPE).operations
    assert nested["transforms"][0]["size"] == last["size"] == [20, 24]
    plain = file.with_name("plain.toml")
    plain.write_text(FILE)
    nested, last = read_augmentation(f"{plain},{option}", image_shape=SHAPE).operations
    assert nested["transforms"][0]["size"] == last["size"] == size


@pytest.mark.parametrize("size", ["0", "-3", "3.5", "8x", "x8", "8x8x8", "True", "None", "(8,8)", "big", "''"])
def test_sizes_that_are_none_are_refused(size: str) -> None:
    """A size is one or two positive whole numbers."""
    with pytest.raises(SpecError, match="size: expected N or HEIGHTxWIDTH in pixels"):
        make(f"crop-flip,size={size}")


def test_options_that_do_nothing_are_refused(tmp_path: Path) -> None:
    """A size that nothing takes, an option that nobody knows, and a probability of no mixing are errors, not silence."""
    for augment, words in (
        ("none,size=8", 'none has no size = "input" that the option size could replace'),
        ("crop-flip,magnitude=3", "unknown option magnitude; crop-flip takes: cutmix, mixup, probability, size"),
        ("crop-flip,padding=3,p=1", "unknown option p, padding"),
        ("crop-flip,probability=0.5", "without mixup or cutmix mixes nothing"),
        ("crop-flip,size", "expected key=value after the comma"),
    ):
        with pytest.raises(SpecError, match=words):
            make(augment)


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        ("crop-flip", None),
        ("crop-flip,mixup=0.2", (0.2, 0.0, 1.0, 0.5)),
        ("crop-flip,cutmix=1,probability=0.25", (0.0, 1.0, 0.25, 0.5)),
        ("timm-a3", (0.1, 1.0, 1.0, 0.5)),
        ("timm-a3,mixup=0", (0.0, 1.0, 1.0, 0.5)),
        ("timm-a3,probability=0.5,mixup=0.4", (0.4, 1.0, 0.5, 0.5)),
        ("timm-a3,mixup=0,cutmix=0", None),
        ("timm-a3,probability=0", None),
    ],
)  # fmt: skip
def test_mixing_by_table_and_options(augment: str, expected: tuple[float, float, float, float] | None) -> None:
    """The file's [mix] table is the start, options go before it, and what mixes nothing is no mixing at all."""
    mixing = make(augment).record.mixing
    assert mixing == (expected and MixingRecord(mixup=expected[0], cutmix=expected[1], probability=expected[2], switch=expected[3]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("mixup = -0.1", "expected mixup as 0 or a number from 1e-06 to 1000, found -0.1"),
        ("cutmix = 1e9", "expected cutmix as 0 or a number from 1e-06 to 1000"),
        ("mixup = 1e-310", "expected mixup as 0 or a number from 1e-06 to 1000, found 1e-310"),
        ("mixup = 0.1\nprobability = 1.5", "expected probability as a number from 0 to 1, found 1.5"),
        ("mixup = 0.1\nswitch = true", "expected switch as a number from 0 to 1, found True"),
        ("mixup = '0.1'", "expected mixup as 0 or a number from 1e-06 to 1000, found '0.1'"),
        ("mixup = nan", "expected finite numbers"),
        ("alpha = 0.1", "a \\[mix\\] table with the keys mixup, cutmix, probability, switch, found {'alpha': 0.1}"),
        ("switch = 0.5", "switch without mixup or cutmix mixes nothing"),
    ],
)
def test_wrong_mixing_is_refused(table: str, message: str, tmp_path: Path) -> None:
    """Strengths and shares are checked numbers, by the names of the table."""
    path = tmp_path / "mine.toml"
    path.write_text(f"ops = []\n[mix]\n{table}\n")
    with pytest.raises(SpecError, match=message):
        make(str(path))


@pytest.mark.parametrize("value", ["2024-01-01", "inf", "[1, [nan]]"])
def test_values_that_no_manifest_holds_are_refused(value: str, tmp_path: Path) -> None:
    """Dates and numbers that are not finite cannot stand in a manifest."""
    path = tmp_path / "mine.toml"
    path.write_text(f"ops = [{{op = 'Pad', padding = {value}}}]")
    with pytest.raises(SpecError, match="expected finite numbers, strings, true, false, and lists and tables of these"):
        make(str(path))


def test_teacher_has_an_end_of_its_own(file: Path) -> None:
    """The shared views have the students' size; the teacher's end makes of them what the teacher wants."""
    views = make(str(file))
    end = End(views.record.teacher_end)
    assert views.record.teacher_end == ({"op": "Resize", "size": [40, 48]}, {"op": "CenterCrop", "size": 32})
    assert views.output_shape(SHAPE) == SHAPE
    assert end.output_shape(views.output_shape(SHAPE)) == (3, 32, 32)
    assert end(views(noise_image(), b"k" * 16, 3)).shape == (3, 32, 32)


@pytest.mark.parametrize("operation", ["op = 'RandomHorizontalFlip'", "op = 'RandomInvert'\np = 1.0", "op = 'Normalize'", "size = 3"])
def test_teacher_draws_nothing(operation: str, tmp_path: Path) -> None:
    """Operations with chance, and floats, are refused in the teacher's own part."""
    path = tmp_path / "mine.toml"
    path.write_text(f"ops = []\n[[teacher]]\n{operation}\n")
    with pytest.raises(SpecError, match=r"mine\.toml: .* is not among the operations that one network may have for itself"):
        make(str(path))


class DrawingResize(v2.Resize):
    """A Resize that draws, as one of a later torchvision might."""

    def make_params(self, _: list[Any]) -> dict[str, Any]:
        torch.rand(1)
        return {}


def test_a_name_alone_is_no_proof(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's end is run: an operation that draws in spite of its name is refused."""
    monkeypatch.setattr(v2, "Resize", DrawingResize)
    with pytest.raises(SpecError, match="must not draw, and one of Resize, CenterCrop does"):
        make(str(file))


def test_views_of_one_image_have_one_size(tmp_path: Path) -> None:
    """Views of several sizes could not share a batch: they are refused when the augmentation is read."""
    path = tmp_path / "mine.toml"
    path.write_text("[[ops]]\nop = 'RandomResize'\nmin_size = 8\nmax_size = 20\n")
    with pytest.raises(SpecError, match=r"expected views of one size, found .* end with an operation that gives a fixed size"):
        make(str(path))


def test_unknown_names_show_the_nearest() -> None:
    """A slip of the pen is met with the names that look like it."""
    for name, nearest in (("crop_flip", "crop-flip"), ("rand-aug", "randaug"), ("timm_a3,size=160", "timm-a3")):
        with pytest.raises(SpecError, match=f"expected one of: none, .*an existing .toml file; did you mean {nearest}"):
            make(name)


def test_command_shows_and_lists(tmp_path: Path) -> None:
    """`kdcache augment show` prints TOML that can be copied, `list` all names; both give JSON, and a wrong name exits 2."""
    shown = kdcache("augment", "show", "timm-a3", cwd=tmp_path).stdout
    assert shown == augmentation_text("timm-a3")
    assert tomllib.loads(shown)["mix"]["cutmix"] == 1.0
    assert kdcache_json("augment", "show", "none", cwd=tmp_path) == {"name": "none", "text": augmentation_text("none")}
    listed = kdcache("augment", "list", cwd=tmp_path).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(PIPELINES)
    assert [item["name"] for item in kdcache_json("augment", "list", cwd=tmp_path)["augmentations"]] == list(PIPELINES)
    failed = kdcache("augment", "show", "randog", cwd=tmp_path, exits=2)
    assert "no augmentation 'randog'; expected one of: none, crop-flip" in failed.stderr
    assert "did you mean randaug" in failed.stderr
