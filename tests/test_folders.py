"""`folder:PATH`: images in class folders, their keys, and all that may lie in a folder besides."""

import io
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from images_on_disk import encoded, make_folder, opened, picture
from PIL import Image

from kdcache.learning import datasets
from kdcache.learning.sources import file_keys
from kdcache.learning.sources.images import decode_rgb
from kdcache.learning.sources.source import bytes_key
from kdcache.records.errors import SpecError, UnreadableSampleError
from kdcache.records.specs import Spec

CLASSES = {"cat": 3, "dog": 2, "owl": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with three, two and one image."""
    return make_folder(tmp_path / "images", CLASSES)


def key_set(dataset: datasets.Dataset) -> set[bytes]:
    """The dataset's keys as a set."""
    return {key.tobytes() for key in dataset.keys}


def test_classes_are_folders_by_name(folder: Path) -> None:
    """Every class folder is a class, numbered by name; its images are the samples, by name, with their paths as names."""
    dataset = opened(f"folder:{folder}")
    assert (len(dataset), dataset.num_classes, dataset.image_shape, dataset.sample_shape) == (6, 3, (3, 10, 12), (3, 10, 12))
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 2] == [dataset[row][1] for row in range(6)]
    assert [dataset.name_of(row) for row in (0, 5)] == [str(folder / "cat" / "0.png"), str(folder / "owl" / "0.png")]
    assert np.array_equal(dataset[3][0].permute(1, 2, 0).numpy(), np.asarray(picture(100)))


def test_keys_and_labels_need_no_decoding(folder: Path) -> None:
    """Keys are digests of the encoded files, and labels come from the folders: files that are no images have both."""
    (folder / "cat" / "1.png").write_bytes(b"no image at all")
    dataset = opened(f"folder:{folder}")
    assert dataset.keys[1].tobytes() == bytes_key(b"no image at all")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 2]


def test_keys_survive_copying_renaming_and_sorting(folder: Path, tmp_path: Path) -> None:
    """A copy elsewhere under other file names has the same keys and recipe record of its samples; order alone changes the digest."""
    before = opened(f"folder:{folder}")
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copy"))
    assert opened(f"folder:{copy}").record() == before.record()
    (copy / "cat" / "0.png").rename(copy / "cat" / "zzz.PNG")
    (copy / "dog" / "1.png").rename(copy / "dog" / "deep.png")
    (copy / "dog" / "inside").mkdir()
    (copy / "dog" / "deep.png").rename(copy / "dog" / "inside" / "deep.png")
    after = opened(f"folder:{copy}")
    assert key_set(after) == key_set(before)
    assert after.record().sha256 != before.record().sha256


def test_a_record_says_nothing_of_the_place(folder: Path) -> None:
    """The recipe names a folder of images and its split, never the path."""
    assert opened(f"folder:{folder}").record().spec == "folder:images"
    assert opened(f"folder:{folder.parent},split=images").record().spec == "folder:images,split=images"


def test_splits(tmp_path: Path) -> None:
    """With `split=`, PATH/SPLIT/CLASS is read; a label means the same in every split, also where one lacks a class."""
    root = tmp_path / "set"
    make_folder(root / "train", CLASSES)
    make_folder(root / "test", {"owl": 2}, seed=1)
    train, test = (opened(f"folder:{root},split={split}") for split in ("train", "test"))
    assert train.num_classes == test.num_classes == 3
    assert test.labels.tolist() == [2, 2]
    assert datasets.held_out_split(train.spec) == test.spec
    assert datasets.held_out_split(test.spec) is None
    assert datasets.held_out_split(Spec.parse(f"folder:{root / 'train'}")) is None
    shutil.move(root / "test", root / "val")
    assert str(datasets.held_out_split(train.spec)) == f"folder:{root},split=val"
    make_folder(root / "val" / "more", {"zebra": 1})
    (root / "val" / "more" / "zebra").rename(root / "val" / "zebra")
    shutil.rmtree(root / "val" / "more")
    with pytest.raises(SpecError, match="has classes that the training split has not: zebra"):
        opened(f"folder:{root},split=val")


def test_splits_without_a_training_split_share_their_classes(tmp_path: Path) -> None:
    """Where no split is called train, the classes are those of all splits together."""
    make_folder(tmp_path / "north", {"cat": 1, "owl": 1})
    make_folder(tmp_path / "south", {"dog": 1, "owl": 1}, seed=1)
    assert opened(f"folder:{tmp_path},split=north").labels.tolist() == [0, 2]
    assert opened(f"folder:{tmp_path},split=south").labels.tolist() == [1, 2]


def test_missing_folders_and_splits_are_refused(tmp_path: Path) -> None:
    """What is not there is a SpecError that names the place and what is there instead."""
    root = tmp_path / "set"
    with pytest.raises(SpecError, match=rf"there is no folder {root}"):
        opened(f"folder:{root}")
    root.mkdir()
    with pytest.raises(SpecError, match=r"no class folders in .*expected a folder of images for each class"):
        opened(f"folder:{root}")
    (root / "a.png").write_bytes(encoded(picture(0)))
    with pytest.raises(SpecError, match="no class folders"):
        opened(f"folder:{root}")
    with pytest.raises(SpecError, match="expected a folder, found a file"):
        opened(f"folder:{root / 'a.png'}")
    (root / "cat").mkdir()
    with pytest.raises(SpecError, match=r"no images in the folders of .*; images end in .bmp, .gif, .jpeg"):
        opened(f"folder:{root}")
    make_folder(root / "x", {"dog": 1})
    (root / "x" / "dog").rename(root / "dog")
    shutil.rmtree(root / "x")
    with pytest.raises(SpecError, match=rf"no images in {root / 'cat'}; remove what is no class"):
        opened(f"folder:{root}")
    with pytest.raises(SpecError, match=r"no split 'train' in .*; there are none; if its folders are the classes, leave `split` out"):
        opened(f"folder:{root},split=train")
    with pytest.raises(SpecError, match=r"unknown option splitt; .* takes: split"):
        opened(f"folder:{root},splitt=train")
    with pytest.raises(SpecError, match=r"expected key=value after the comma, found 'b'"):
        opened("folder:/data/a,b")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    """A folder of splits is refused with the specs that name them; a split that is not there with those that are."""
    make_folder(tmp_path / "train", CLASSES)
    make_folder(tmp_path / "val", CLASSES)
    with pytest.raises(SpecError, match=rf"has splits \(train, val\); say which: folder:{tmp_path},split=train"):
        opened(f"folder:{tmp_path}")
    with pytest.raises(SpecError, match=r"no split 'tset' in .*; there are: train, val"):
        opened(f"folder:{tmp_path},split=tset")
    with pytest.raises(SpecError, match=r"no split '../train'"):
        opened(f"folder:{tmp_path / 'val'},split=../train")


def test_what_is_no_image_is_passed_over(folder: Path) -> None:
    """Hidden files and folders, other files beside the images, and links that lead round in a circle change nothing."""
    before = opened(f"folder:{folder}")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "README.txt").write_text("classes: cat, dog, owl")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "cat" / ".hidden.png").write_bytes(encoded(picture(9)))
    (folder / "cat" / "labels.csv").write_text("1,2")
    (folder / "cat" / "round").symlink_to(folder, target_is_directory=True)
    (folder / "dog" / "self").symlink_to(folder / "dog" / "self")
    os.mkfifo(folder / "dog" / "pipe.png")
    after = opened(f"folder:{folder}")
    found = [after.name_of(row) for row in range(len(after))]
    assert [name for name in found if "round" not in name] == [before.name_of(row) for row in range(len(before))]
    assert len(found) < 40
    (folder / "cat" / "round").unlink()
    assert opened(f"folder:{folder}").record() == before.record()


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "PA", "I;16", "RGB"])
def test_every_kind_of_png_is_three_channels(mode: str) -> None:
    """Grey, palette, alpha, 1-bit and 16-bit images become uint8 [3, height, width] with the colours that they show."""
    grey = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(10, 12) * 2)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "PA":
        image = grey.convert("P")
        image.info["transparency"] = bytes(range(0, 250, 2))
    else:
        image = grey if mode == "P" else grey.convert("RGB").convert(mode)
        image = image.convert(mode)
    pixels = decode_rgb(encoded(image), name="x")
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 10, 12))
    expected = np.asarray(grey.convert("1") if mode == "1" else grey).astype(np.int64) * (255 if mode == "1" else 1)
    assert np.array_equal(pixels[0].numpy(), expected)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PPM", "TIFF", "WEBP"])
def test_every_format_is_decoded(kind: str) -> None:
    """All formats by whose names files are found are decoded to what Pillow makes of them."""
    data = encoded(picture(3, (16, 16)), kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode_rgb(data, name="x").permute(1, 2, 0).numpy(), expected)


def test_cmyk_jpegs_are_colours() -> None:
    """A JPEG in CMYK gives three channels."""
    assert tuple(decode_rgb(encoded(picture(1).convert("CMYK"), "JPEG"), name="x").shape) == (3, 10, 12)


def test_pixels_come_as_they_are_stored() -> None:
    """The orientation in EXIF data is not applied, in JPEG and in PNG alike: as torchvision's folders do, on every version."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for kind in ("JPEG", "PNG"):
        plain = decode_rgb(encoded(picture(1), kind), name="x")
        assert torch.equal(decode_rgb(encoded(picture(1), kind, exif=turned), name="x"), plain)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_what_is_cut_short_is_unreadable(kind: str) -> None:
    """A file of which the end is missing is refused by name, never filled up with grey."""
    data = encoded(picture(5, (40, 40)), kind)
    for length in (len(data) // 2, len(data) * 9 // 10, 12):
        with pytest.raises(UnreadableSampleError, match=r"^there/x cannot be read \(.*--skip-unreadable$"):
            decode_rgb(data[:length], name="there/x")


def test_damaged_png_is_unreadable_and_harmless() -> None:
    """A PNG with a changed byte is refused or decoded; it never ends the process."""
    data = encoded(picture(5, (20, 20)))
    outcomes = set()
    for place in range(0, len(data), 37):
        try:
            decode_rgb(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :], name="x")
            outcomes.add("decoded")
        except UnreadableSampleError:
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff"], ids=["empty", "text", "start of a JPEG"])
def test_an_unreadable_image_is_named(data: bytes, folder: Path) -> None:
    """An image that cannot be decoded is one of kdcache's own errors, with its path and the option that goes on."""
    (folder / "dog" / "0.png").write_bytes(data)
    dataset = opened(f"folder:{folder}")
    with pytest.raises(UnreadableSampleError, match=rf"{folder / 'dog' / '0.png'} cannot be read .*kdcache dump --skip-unreadable"):
        dataset[3]


def test_a_file_that_may_not_be_read_is_named(folder: Path) -> None:
    """A link that leads nowhere is a sample that cannot be read, not one that is not there."""
    (folder / "owl" / "1.png").symlink_to(folder / "nowhere.png")
    dataset = opened(f"folder:{folder}")
    assert len(dataset) == 7
    for look in (lambda: dataset[6], lambda: dataset.keys):
        with pytest.raises(UnreadableSampleError, match=r"owl/1.png cannot be read \(No such file"):
            look()


def test_unreadable_images_are_left_out_on_request(folder: Path) -> None:
    """`skip_unreadable` leaves out what cannot be read and says which; the same samples are left out where it is handed on."""
    (folder / "dog" / "0.png").write_bytes(b"")
    (folder / "owl" / "1.png").symlink_to(folder / "nowhere.png")
    whole = opened(f"folder:{folder}", skip_unreadable=True)
    assert len(whole) == 5
    assert whole.labels.tolist() == [0, 0, 0, 1, 2]
    assert [(sample.name, sample.key) for sample in whole.skipped] == [
        (str(folder / "dog" / "0.png"), bytes_key(b"").hex()),
        (str(folder / "owl" / "1.png"), ""),
    ]
    again = opened(f"folder:{folder}", skipped=whole.skipped)
    assert (again.record(), again.skipped) == (whole.record(), whole.skipped)
    (folder / "cat" / "9.png").write_bytes(b"new and no image")
    assert len(opened(f"folder:{folder}", skipped=whole.skipped)) == 6


def test_nothing_readable_is_refused(tmp_path: Path) -> None:
    """A folder of which no image can be read is refused even where unreadable ones may be left out."""
    make_folder(tmp_path, {"cat": 1})
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(SpecError, match="no sample of the dataset can be read"):
        opened(f"folder:{tmp_path}", skip_unreadable=True)


def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets files be indexed that were written just now."""
    monkeypatch.setattr(file_keys, "TOO_FRESH_NS", -(10**9))


def test_known_files_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look takes the keys of unchanged files from the index, and reads only those that changed."""
    settled(monkeypatch)
    keys = opened(f"folder:{folder}").keys
    assert len(file_keys.read_index(folder)) == 6
    read = []
    digest = file_keys.hashlib.file_digest
    monkeypatch.setattr(file_keys.hashlib, "file_digest", lambda file, make: read.append(file.name) or digest(file, make))
    assert np.array_equal(opened(f"folder:{folder}").keys, keys)
    assert read == []
    (folder / "cat" / "2.png").write_bytes(encoded(picture(77)))
    status = (folder / "dog" / "0.png").stat()
    (folder / "dog" / "0.png").write_bytes((folder / "dog" / "0.png").read_bytes()[::-1])
    os.utime(folder / "dog" / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = opened(f"folder:{folder}").keys
    assert sorted(read) == [str(folder / "cat" / "2.png"), str(folder / "dog" / "0.png")]
    assert np.flatnonzero((changed != keys).any(axis=1)).tolist() == [2, 3]


def test_files_that_may_change_yet_are_not_indexed(folder: Path) -> None:
    """A file that was written just now is read again the next time: a clock's tick cannot hide a change."""
    _ = opened(f"folder:{folder}").keys
    assert file_keys.read_index(folder) == {}


def test_a_bad_index_is_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of which any byte was changed, that is empty or something else, gives no key; it is made anew."""
    settled(monkeypatch)
    keys = opened(f"folder:{folder}").keys
    path = file_keys.index_file(folder)
    good = path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0
    for bad in (b"", b"x", good[:-1], *(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(0, len(good), 41))):
        path.write_bytes(bad)
        assert file_keys.read_index(folder) == {}
    assert np.array_equal(opened(f"folder:{folder}").keys, keys)
    assert path.read_bytes() != bad


def test_an_index_that_cannot_be_written_is_done_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user's cache folder cannot be made, keys are computed all the same."""
    settled(monkeypatch)
    keys = opened(f"folder:{folder}").keys
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cat" / "0.png"))
    assert np.array_equal(opened(f"folder:{folder}").keys, keys)


def test_many_may_write_the_index_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes last wins, a reader always sees a whole index, and no temporary file is left."""
    settled(monkeypatch)
    index = {str(i).encode(): (file_keys.FileState(i, i, i), bytes(16)) for i in range(50)}
    writers = [threading.Thread(target=lambda: [file_keys.write_index(folder, index) for _ in range(10)]) for _ in range(4)]
    file_keys.write_index(folder, index)
    for writer in writers:
        writer.start()
    for _ in range(50):
        assert file_keys.read_index(folder) == index
    for writer in writers:
        writer.join()
    assert [path.name for path in file_keys.index_file(folder).parent.glob(f".{file_keys.index_file(folder).name}*")] == []


def test_a_spec_from_a_file_may_open_a_folder(folder: Path) -> None:
    """Looking at local images is no risk: a folder opens whoever named it."""
    assert len(opened(f"folder:{folder}", trusted=False)) == 6


def test_paths_are_made_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache names the folder so that it is found from anywhere; what a spec cannot say is refused."""
    monkeypatch.chdir(folder.parent)
    assert str(datasets.with_absolute_paths(Spec.parse("folder:images"))) == f"folder:{folder}"
    assert str(datasets.with_absolute_paths(Spec.parse("fashion-mini"))) == "fashion-mini"
    (folder / "a,b").mkdir()
    monkeypatch.chdir(folder / "a,b")
    with pytest.raises(SpecError, match="a path with a comma cannot be said in a spec; make a link"):
        datasets.with_absolute_paths(Spec.parse("folder:images"))
    equal = make_folder(folder.parent / "a=b c", {"cat": 1})
    assert len(opened(str(datasets.with_absolute_paths(Spec.parse(f"folder:{equal}"))))) == 1
