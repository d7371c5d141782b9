"""What is installed: one top-level name, all data files, the same from a checkout and from a source distribution."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kdcache", "cli", "data", "tests")
OLDEST_SETUPTOOLS = 77

WHERE = """
import importlib, importlib.metadata, json, sys
modules = [importlib.import_module(name) for name in ("kdcache", "kdcache.cli", "kdcache.data")]
origin = importlib.metadata.distribution("kdcache").read_text("direct_url.json")
json.dump({"files": [module.__file__ for module in modules], "origin": json.loads(origin or "{}")}, sys.stdout)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """The two distributions of this tree."""

    sdist: Path
    """The `.tar.gz`."""
    wheel: Path
    """The `.whl`."""


def run(*command: str | Path, cwd: Path, **extra: str) -> str:
    """Runs a program to its end and gives its stdout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**inherited, **extra}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(tree: Path, *kinds: str) -> Path:
    """Builds distributions of a tree with what is installed here; gives the folder that holds them."""
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, tree, cwd=tree)
    return tree / "dist"


def require_build_tools() -> None:
    """Says what to install rather than skipping: a wheel that nobody built is a wheel that nobody tested."""
    if importlib.util.find_spec("build") is None:
        pytest.fail("the packaging tests need the package 'build': pip install -e '.[test]'")
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        found = "0"
    if int(found.partition(".")[0]) < OLDEST_SETUPTOOLS:
        pytest.fail(f"the packaging tests need setuptools {OLDEST_SETUPTOOLS} or later here: pip install 'setuptools>={OLDEST_SETUPTOOLS}'")


def files_in(wheel: Path) -> list[str]:
    """The names of a wheel's files, sorted."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Source distribution and wheel, both built from a copy of this tree."""
    require_build_tools()
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = build(tree, "--sdist", "--wheel")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(sdist=sdist, wheel=wheel)


@pytest.fixture
def unpacked(built: Built, tmp_path: Path) -> Path:
    """A folder that holds the wheel's files and nothing else."""
    folder = tmp_path / "site"
    shutil.unpack_archive(built.wheel, folder, "zip")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "kdcache/cli/main.py",
        "kdcache/data/LICENSE-fashion-mnist",
        "kdcache/data/README.md",
        "kdcache/data/fashion-mini.npz",
        "kdcache/data/fashion-teacher.safetensors",
        "kdcache/learning/pipelines/crop-flip.toml",
        "kdcache/py.typed",
        "kdcache/store/FORMAT.md",
    ],
)
def test_wheel_holds(built: Built, name: str) -> None:
    """The wheel holds every module and data file that the package reads or promises, with its content."""
    source = ROOT / name if (ROOT / name).exists() else ROOT / name.removeprefix("kdcache/")
    with zipfile.ZipFile(built.wheel) as archive:
        assert name in archive.namelist()
        assert archive.read(name) == source.read_bytes()


def test_wheel_holds_every_pipeline(built: Built) -> None:
    """Each augmentation file of the tree is in the wheel."""
    expected = sorted(f"kdcache/learning/pipelines/{path.name}" for path in (ROOT / "kdcache/learning/pipelines").glob("*.toml"))
    assert expected
    assert [name for name in files_in(built.wheel) if name.startswith("kdcache/learning/pipelines/")] == expected


def test_wheel_holds_every_module(built: Built) -> None:
    """No module of the package, the command line or the data folder is left out: the list of packages is complete."""
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "kdcache").rglob("*.py")]
    modules += [f"kdcache/{path.relative_to(ROOT)}" for folder in ("cli", "data") for path in (ROOT / folder).rglob("*.py")]
    assert sorted(modules) == [name for name in files_in(built.wheel) if name.endswith(".py")]


def test_wheel_owns_one_top_level_name(built: Built) -> None:
    """Installing kdcache adds `kdcache` to site-packages and nothing called `cli`, `data` or `tests`."""
    names = files_in(built.wheel)
    dist_info = next(name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.partition("/")[0] for name in names} == {"kdcache", dist_info}
    assert f"{dist_info}/licenses/LICENSE" in names


def test_sdist_makes_the_same_wheel(built: Built, tmp_path: Path) -> None:
    """A wheel that is built from the source distribution has the same files as one that is built from a checkout."""
    shutil.unpack_archive(built.sdist, tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    (wheel,) = build(tree, "--wheel").glob("*.whl")
    assert files_in(wheel) == files_in(built.wheel)


def test_sdist_can_be_tested(built: Built) -> None:
    """The source distribution has the tests, their helpers and the documents, so that a packager can run and ship them."""
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    documents = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"}
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert documents | tests <= names


def test_wheel_works_from_a_folder(unpacked: Path, tmp_path: Path) -> None:
    """The unpacked wheel on PYTHONPATH is imported as a whole, from any working directory, and runs as a module."""
    files = json.loads(run(sys.executable, "-c", WHERE, cwd=tmp_path, PYTHONPATH=str(unpacked)))["files"]
    expected = ["kdcache/__init__.py", "kdcache/cli/__init__.py", "kdcache/data/__init__.py"]
    assert files == [str(unpacked / name) for name in expected]
    assert "dump" in run(sys.executable, "-m", "kdcache", "--help", cwd=tmp_path, PYTHONPATH=str(unpacked))


def test_installed_package_is_one(tmp_path: Path) -> None:
    """An editable install finds `kdcache.cli` and `kdcache.data` in the checkout's `cli/` and `data/`, any other below `kdcache/`."""
    found = json.loads(run(sys.executable, "-c", WHERE, cwd=tmp_path))
    package, *parts = (Path(file).parent for file in found["files"])
    editable = found["origin"].get("dir_info", {}).get("editable", False)
    assert parts == ([ROOT / "cli", ROOT / "data"] if editable else [package / "cli", package / "data"])
    assert package == ROOT / "kdcache" or not editable
