"""`folder:PATH[,split=NAME]`: a folder of images for each class, PATH/CLASS/… or PATH/SPLIT/CLASS/…."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from kdcache.learning.sources.file_keys import file_keys
from kdcache.learning.sources.images import EXTENSIONS, decode_rgb, is_image_name, unreadable
from kdcache.learning.sources.source import Keys, Labels, Rows
from kdcache.records.errors import SpecError
from kdcache.records.specs import Spec

TRAINING_SPLITS = ("train", "training")
HELD_OUT_SPLITS = ("test", "testing", "val", "valid", "validation")
"""Names of folders that hold a split, best first."""


class FolderSource:
    """Images in class folders. Classes are sorted by name, samples by class and path, both by code point.

    Images may lie deeper inside a class folder. Hidden files and folders, and files that are no images by their name, are
    passed over; links are followed, except in a circle. With splits, the classes are those of the training split where there is
    one, else of all splits together, so that a label means the same in all of them.

    Raises:
        SpecError: No such folder or split, or no class folders, or one without images.
    """

    def __init__(self, spec: Spec) -> None:
        spec.reject_unknown_options("split")
        self.root = folder_path(spec)
        split = spec.options.get("split")
        folder = self.root if split is None else _split_folder(spec, self.root, str(split))
        if split is None:
            _refuse_splits(spec, self.root)
        files = {path.name: list(_images(path)) for path in _subfolders(folder)}
        self.classes = _classes(spec, folder, files, split=split is not None)
        self._folder = folder
        self._files = [file for name in self.classes for file in files.get(name, ())]
        self._labels = np.repeat(np.arange(len(self.classes)), [len(files.get(name, ())) for name in self.classes])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.sample_name(index)
        try:
            data = Path(self._files[index]).read_bytes()
        except OSError as error:
            raise unreadable(name, error.strerror or error) from error
        return decode_rgb(data, name=name), int(self._labels[index])

    def sample_keys(self, rows: Rows) -> Keys:
        """BLAKE2b of the encoded files: no image is decoded, and a file that is known already is not read."""
        return file_keys(self._folder, [self._files[row] for row in rows.tolist()], known=self._files)

    def sample_labels(self, rows: Rows) -> Labels:
        """The labels, by the folders' names."""
        labels: Labels = self._labels[rows]
        return labels

    def sample_name(self, row: int) -> str:
        """The file's path, as text that can be printed."""
        return os.fsencode(self._files[row]).decode("utf-8", "replace")


def folder_path(spec: Spec) -> Path:
    """The folder that a spec names.

    Raises:
        SpecError: It is not there, or is no folder.
    """
    path = Path(spec.name).expanduser().absolute()
    if not path.exists():
        raise SpecError(f"{spec}: there is no folder {path}")
    if not path.is_dir():
        raise SpecError(f"{spec}: expected a folder, found a file at {path}")
    return path


def held_out_folder(spec: Spec) -> Spec | None:
    """The held-out split beside a training split; None where there is none, or the spec names no training split."""
    root = Path(spec.name).expanduser()
    if spec.options.get("split") not in TRAINING_SPLITS:
        return None
    return next((spec.with_options(split=name) for name in HELD_OUT_SPLITS if (root / name).is_dir()), None)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder and is not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise SpecError(f"cannot look into {folder}: {error.strerror}") from error


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if _is_folder(entry)]


def _images(folder: str | Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """The images inside a folder, however deep, by name; `above`: the folders on the way, so that no link leads round in a circle."""
    status = os.stat(folder)  # noqa: PTH116
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _images(entry.path, above | {here})
        elif is_image_name(entry.name) and (entry.is_symlink() or entry.is_file()):
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _has_images(folder: Path) -> bool:
    return next(_images(folder), None) is not None


def _splits(root: Path) -> list[str]:
    """Folders whose own folders have images."""
    return [path.name for path in _subfolders(root) if any(map(_has_images, _subfolders(path)))]


def _split_folder(spec: Spec, root: Path, split: str) -> Path:
    splits = _splits(root)
    if split not in splits:
        there = f"there are: {', '.join(splits)}" if splits else "there are none; if its folders are the classes, leave `split` out"
        raise SpecError(f"{spec}: no split {split!r} in {root}; {there}")
    return root / split


def _refuse_splits(spec: Spec, root: Path) -> None:
    """Folders called `train` or `test` with folders instead of images in them are splits, not classes."""
    found = [path.name for path in _subfolders(root) if path.name in TRAINING_SPLITS + HELD_OUT_SPLITS and _holds_folders_only(path)]
    if found:
        first = next((name for name in TRAINING_SPLITS if name in found), found[0])
        raise SpecError(f"{spec}: {root} has splits ({', '.join(found)}); say which: {spec.with_options(split=first)}")


def _holds_folders_only(folder: Path) -> bool:
    entries = _entries(folder)
    return any(map(_is_folder, entries)) and not any(is_image_name(entry.name) for entry in entries)


def _classes(spec: Spec, folder: Path, files: dict[str, list[str]], *, split: bool) -> list[str]:
    """The names of the classes, by label."""
    if not files:
        raise SpecError(f"{spec}: no class folders in {folder}; expected a folder of images for each class: {folder}/CLASS/IMAGE")
    own = {name for name, found in files.items() if found}
    if not own:
        raise SpecError(f"{spec}: no images in the folders of {folder}; images end in {', '.join(sorted(EXTENSIONS))}")
    classes = _classes_of_splits(folder) if split else own
    strange = sorted(own - classes)
    if strange:
        raise SpecError(f"{spec}: {folder} has classes that the training split has not: {', '.join(strange)}")
    empty = sorted(set(files) - classes)
    if empty:
        raise SpecError(f"{spec}: no images in {', '.join(str(folder / name) for name in empty)}; remove what is no class")
    return sorted(classes)


def _classes_of_splits(folder: Path) -> set[str]:
    """The classes of the training split beside a split's folder, else those of all splits."""
    splits = _splits(folder.parent)
    reference = [name for name in TRAINING_SPLITS if name in splits][:1] or splits
    return {path.name for name in reference for path in _subfolders(folder.parent / name) if _has_images(path)}
