"""The layers: who may import whom, and that torch is loaded only where it is needed."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import kdcache

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "kdcache.data": ROOT / "data",
    "kdcache.records": ROOT / "kdcache" / "records",
    "kdcache.store": ROOT / "kdcache" / "store",
    "kdcache.targets": ROOT / "kdcache" / "targets",
    "kdcache.learning": ROOT / "kdcache" / "learning",
    "kdcache.workflows": ROOT / "kdcache" / "workflows",
}
MAY_IMPORT = {
    "kdcache.records": set(),
    "kdcache.data": {"kdcache.records"},
    "kdcache.store": {"kdcache.records"},
    "kdcache.targets": {"kdcache.records"},
    "kdcache.learning": {"kdcache.records", "kdcache.data", "kdcache.store", "kdcache.targets"},
    "kdcache.workflows": {"kdcache.records", "kdcache.data", "kdcache.store", "kdcache.targets", "kdcache.learning"},
}
MODULES = [(layer, path) for layer, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]
CLI_MODULES = sorted((ROOT / "cli").glob("*.py"))


def imported_modules(path: Path, package: str) -> Iterator[str]:
    """Every module that a file imports, at its top or inside its functions, by absolute name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            assert module is not None
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "kdcache" else (module,)


def layer_of(module: str) -> str:
    """The layer of a module of kdcache: its first two names."""
    return ".".join(module.split(".")[:2])


def modules_loaded_by(*arguments: str | Path) -> set[str]:
    """Every module that a Python process imports, as Python itself lists them."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_every_folder_of_the_package_is_a_known_layer() -> None:
    """A folder with code in it cannot escape the order of the layers by being new."""
    folders = {layer_of(".".join(path.relative_to(ROOT).parts)) for path in (ROOT / "kdcache").glob("*/**/*.py")}
    assert folders | {"kdcache.data"} == set(MAY_IMPORT)
    assert {layer for layer, _ in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize(("layer", "path"), MODULES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_nothing_imports_upward(layer: str, path: Path) -> None:
    """A module imports its own layer and the layers below it, never the package's lazy public names."""
    own = {layer_of(module) for module in imported_modules(path, layer) if module.split(".")[0] == "kdcache"}
    assert own <= MAY_IMPORT[layer] | {layer}, f"{path} imports {sorted(own - MAY_IMPORT[layer] - {layer})}"


@pytest.mark.parametrize("path", [path for layer, path in MODULES if layer == "kdcache.records"], ids=lambda path: path.stem)
def test_records_need_the_standard_library_only(path: Path) -> None:
    """The records layer imports nothing that is not in Python itself."""
    foreign = {module for module in imported_modules(path, "kdcache.records") if not module.startswith("kdcache.records")}
    assert {module.split(".")[0] for module in foreign} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", [path for layer, path in MODULES if layer == "kdcache.store"], ids=lambda path: path.stem)
def test_store_does_not_know_torch(path: Path) -> None:
    """No module of the store imports torch or anything of its family."""
    assert not {module.split(".")[0] for module in imported_modules(path, "kdcache.store")} & {"torch", "torchvision", "safetensors"}


@pytest.mark.parametrize("path", CLI_MODULES, ids=lambda path: path.stem)
def test_command_line_uses_public_names_only(path: Path) -> None:
    """A command imports `kdcache` itself and its own siblings, and asks kdcache for public names only."""
    modules = {module for module in imported_modules(path, "kdcache.cli") if module.split(".")[0] == "kdcache"}
    assert {module for module in modules if layer_of(module) != "kdcache.cli"} <= {"kdcache"}
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kdcache"
    }
    assert used <= set(kdcache.__all__)


@pytest.mark.parametrize("name", kdcache.__all__)
def test_public_name_resolves(name: str) -> None:
    """Every name in `__all__` can be had and is what its module calls by that name."""
    value = getattr(kdcache, name)
    assert getattr(value, "__name__", name) == name
    assert name in dir(kdcache)


def test_public_names_are_the_type_checkers_names() -> None:
    """The names that a type checker sees are those that resolve at run time, from the same modules."""
    tree = ast.parse((ROOT / "kdcache" / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == kdcache._PUBLIC
    assert list(kdcache._PUBLIC) == sorted(kdcache._PUBLIC)


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt public name says so, as any module does."""
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = kdcache.tarin


def test_import_is_inert() -> None:
    """`import kdcache` imports nothing of the layers, and none of its dependencies."""
    loaded = modules_loaded_by(sys.executable, "-c", "import kdcache")
    assert "kdcache" in loaded
    assert not {name for name in loaded if name.startswith("kdcache.")}
    assert not {name.split(".")[0] for name in loaded} & {"torch", "torchvision", "numpy", "zarr", "matplotlib"}


@pytest.mark.parametrize("arguments", [("--help",), ("info", "nowhere"), ("verify", "nowhere")], ids=" ".join)
def test_commands_about_a_store_load_no_torch(arguments: tuple[str, ...], kdcache_command: Path) -> None:
    """Help, info and verify answer without importing torch."""
    loaded = modules_loaded_by(kdcache_command, *arguments)
    assert "kdcache.cli.main" in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("torch", "torchvision", "torchmetrics")}


def test_store_loads_no_torch() -> None:
    """The whole store can be used in a process that never loads torch."""
    modules = [f"kdcache.store.{path.stem}" for path in FOLDERS["kdcache.store"].glob("*.py") if path.stem != "__init__"]
    loaded = modules_loaded_by(sys.executable, "-c", f"import zarr, {', '.join(modules)}")
    assert set(modules) <= loaded
    assert "torch" not in loaded
