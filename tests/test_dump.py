"""Stage one through the installed command: whole or resumable, never half, never somebody else's."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import KDCACHE, environment, kdcache, kdcache_json

from kdcache.learning.checkpoints import save_model
from kdcache.learning.models import build_model
from kdcache.records.specs import Spec

TEACHER = "medium,channels=1,image_size=28,num_classes=10"
DUMP = ("dump", "--teacher", "teacher.safetensors", "--data", "fashion-mini", "--out", "cache", "--codec", "topk,k=5")
SMALL_BLOCKS = (*DUMP, "--views", "6", "--block-samples", "500", "--batch-size", "125")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of random weights: what it says does not matter here."""
    folder = tmp_path_factory.mktemp("teacher")
    import torch

    torch.manual_seed(7)
    spec = Spec.parse(TEACHER)
    save_model(folder / "teacher.safetensors", build_model(spec, trusted=True), spec=spec, metadata={})
    return folder


@pytest.fixture
def folder(teacher_folder: Path, tmp_path: Path) -> Path:
    """A fresh folder with the teacher in it."""
    shutil.copy(teacher_folder / "teacher.safetensors", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def dumped(teacher_folder: Path) -> Path:
    """A folder with a complete cache that tests must not change."""
    kdcache(*DUMP, "--views", "2", cwd=teacher_folder)
    return teacher_folder


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def written(root: Path) -> dict[str, tuple[int, int]]:
    """When and as which file each chunk file of a marked block was written."""
    import json

    marks = [json.loads(path.read_text()) for path in (root / ".dump" / "blocks").glob("*.json")]
    stats = {file["path"]: (root / file["path"]).stat() for mark in marks for file in mark["files"]}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}


def listen_to_interrupts() -> None:
    """A process that was started in the background ignores SIGINT, and so do its children unless told otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ten_kills_leave_no_trace(folder: Path) -> None:
    """A dump killed ten times at random moments ends byte-identical, and no marked block is computed again."""
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    shutil.copy(folder / "teacher.safetensors", undisturbed)
    kdcache(*SMALL_BLOCKS, cwd=undisturbed)
    generator = random.Random(20261121)
    marked: dict[str, tuple[int, int]] = {}
    kills = 0
    while kills < 10:
        process = subprocess.Popen([KDCACHE, *SMALL_BLOCKS], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        with process.stderr:
            process.stderr.readline()  # the first block is on the disk, or an earlier run's blocks were found
            time.sleep(generator.uniform(0, 0.2))
            process.kill()
        assert process.wait() == -signal.SIGKILL, "the dump ended before it was killed: give it more work"
        kills += 1
        now = written(folder / "cache")
        assert {path: now[path] for path in marked} == marked
        marked = now
    assert marked
    assert "going on: " in kdcache(*SMALL_BLOCKS, cwd=folder).stderr
    final = {path: (folder / "cache" / path).stat() for path in marked}
    assert {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in final.items()} == marked
    assert tree(folder / "cache") == tree(undisturbed / "cache")


def test_second_dump_into_the_same_folder_is_refused(folder: Path) -> None:
    """While one dump runs, another into the same directory exits 1 and names the process."""
    first = subprocess.Popen([KDCACHE, *SMALL_BLOCKS], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    with first.stderr:
        first.stderr.readline()
        first.send_signal(signal.SIGSTOP)
        refused = kdcache(*SMALL_BLOCKS, cwd=folder, exits=1)
        first.kill()
        first.send_signal(signal.SIGCONT)
    first.wait()
    assert "already running" in refused.stderr
    assert str(first.pid) in refused.stderr


def test_interrupt_says_how_to_go_on(folder: Path) -> None:
    """Ctrl-C exits 130, what is marked stays, and train refuses the unfinished cache with the way on."""
    process = subprocess.Popen(
        [KDCACHE, *SMALL_BLOCKS], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_interrupts
    )
    assert process.stderr is not None
    with process.stderr:
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.wait() == 130
    assert "the same command goes on" in rest
    refused = kdcache("train", "--student", "tiny", "--cache", "cache", "--out", "run", cwd=folder, exits=3)
    assert "is not finished" in refused.stderr
    assert "of 20 blocks" in kdcache("verify", "cache", cwd=folder, exits=3).stderr or "blocks are done" in refused.stderr
    state = kdcache_json("info", "cache", cwd=folder)
    assert state["manifest"] is None
    assert 0 < state["blocks_done"] < state["blocks_total"]


def test_dump_again_is_done_at_once(dumped: Path) -> None:
    """The same command on a complete cache computes nothing and changes no byte."""
    before = tree(dumped / "cache")
    assert kdcache_json(*DUMP, "--views", "2", cwd=dumped)["blocks_computed"] == 0
    assert tree(dumped / "cache") == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("--codec", "topk,k=4"), "codec"),
        (("--augment", "none"), "views.pipeline"),
        (("--seed", "1"), "views.seed"),
        (("--data", "fashion-mini,split=test"), "dataset.sha256"),
        (("--teacher", "other.safetensors"), "teacher.sha256"),
    ],
)
def test_another_recipe_is_refused_with_its_fields(dumped: Path, change: tuple[str, str], field: str) -> None:
    """A cache whose teacher, dataset, pipeline, seed or codec differs exits 3 and names the differing fields."""
    import torch

    torch.manual_seed(8)
    spec = Spec.parse(TEACHER)
    save_model(dumped / "other.safetensors", build_model(spec, trusted=True), spec=spec, metadata={})
    before = tree(dumped / "cache")
    refused = kdcache(*DUMP, "--views", "2", *change, cwd=dumped, exits=3)
    assert field in refused.stderr
    assert "choose another --out" in refused.stderr
    assert tree(dumped / "cache") == before


def test_a_folder_with_something_else_is_left_alone(folder: Path) -> None:
    """A dump into a folder that holds other files is refused and writes nothing there."""
    (folder / "cache").mkdir()
    (folder / "cache" / "thesis.tex").write_text("…")
    refused = kdcache(*DUMP, cwd=folder, exits=3)
    assert "not empty" in refused.stderr
    assert list(tree(folder / "cache")) == ["thesis.tex"]


def test_nan_stops_the_dump_and_names_the_sample(folder: Path) -> None:
    """A teacher that gives NaN stops the dump before the block is written, naming sample and view."""
    import torch

    spec = Spec.parse(TEACHER)
    model = build_model(spec, trusted=True)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_model(folder / "teacher.safetensors", model, spec=spec, metadata={})
    failed = kdcache(*DUMP, cwd=folder, exits=1)
    assert "view 0 of sample 0" in failed.stderr
    assert not list((folder / "cache").rglob("c/*"))


def test_flipped_bits_are_found_and_named(dumped: Path, tmp_path: Path) -> None:
    """A flipped bit in any array file: verify exits 3 and names file and block, train refuses too."""
    cache = tmp_path / "cache"
    shutil.copytree(dumped / "cache", cache)
    manifest = kdcache_json("info", cache, cwd=tmp_path)["manifest"]
    files = [(file["path"], block["block"]) for block in manifest["blocks"] for file in block["files"]]
    generator = random.Random(5)
    for path, block in [*generator.sample(files, 4), (manifest["metadata_files"][0]["path"], None)]:
        whole = (cache / path).read_bytes()
        damaged = bytearray(whole)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        (cache / path).write_bytes(damaged)
        found = kdcache("verify", cache, cwd=tmp_path, exits=3)
        assert path in found.stdout
        if block is not None:
            assert f"s{block['sample_block']:05d}" in found.stdout
        (cache / path).write_bytes(whole)
    (cache / path).write_bytes(damaged)
    refused = kdcache("train", "--student", "tiny", "--cache", cache, "--out", "run", cwd=tmp_path, exits=3)
    assert path in refused.stderr
    (cache / path).write_bytes(whole)
    kdcache("verify", cache, cwd=tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "remove", "swap"])
def test_other_damage_is_found(dumped: Path, tmp_path: Path, damage: str) -> None:
    """A truncated, missing or swapped chunk file is named by verify."""
    cache = tmp_path / "cache"
    shutil.copytree(dumped / "cache", cache)
    chunks = sorted(path for path in (cache / "logits" / "gap" / "c").rglob("*") if path.is_file())
    if damage == "truncate":
        chunks[0].write_bytes(chunks[0].read_bytes()[:-1])
    elif damage == "remove":
        chunks[0].unlink()
    else:
        content = chunks[0].read_bytes()
        chunks[0].write_bytes(chunks[1].read_bytes())
        chunks[1].write_bytes(content)
    found = kdcache("verify", cache, cwd=tmp_path, exits=3)
    assert str(chunks[0].relative_to(cache)) in found.stdout


def test_edited_manifest_is_refused(dumped: Path, tmp_path: Path) -> None:
    """A manifest that was edited after it was written is refused by every reader."""
    cache = tmp_path / "cache"
    shutil.copytree(dumped / "cache", cache)
    manifest = cache / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    for command in (("info", cache), ("verify", cache)):
        assert "damaged or was edited" in kdcache(*command, cwd=tmp_path, exits=3).stderr
