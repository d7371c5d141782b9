"""Stage two through the installed command, and the library in a user's own loop."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import KDCACHE, environment, kdcache, kdcache_json
from kdcache.data import embedded_teacher
from safetensors import safe_open
from safetensors.torch import load_file

import kdcache as library

ROOT = Path(__file__).parents[1]
TRAIN = ("train", "--student", "tiny", "--cache", "cache", "--epochs", "3", "--batch-size", "100")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small complete cache whose teacher file is gone."""
    folder = tmp_path_factory.mktemp("stage-two")
    teacher = folder / "teacher.safetensors"
    shutil.copy(embedded_teacher(), teacher)
    dump = ("dump", "--teacher", teacher, "--data", "fashion-mini,split=test", "--views", "2", "--codec", "topk,k=5")
    kdcache(*dump, "--out", "cache", cwd=folder)
    teacher.unlink()
    return folder


def test_training_needs_no_teacher_and_records_the_cache(folder: Path) -> None:
    """Two students train in one pass without the teacher's file; weights name the recipe key, metrics hold every epoch."""
    result = kdcache_json(*TRAIN, "--student", "small", "--out", "two", cwd=folder)
    key = kdcache_json("info", "cache", cwd=folder)["recipe_key"]
    assert [student["name"] for student in result["students"]] == ["tiny", "small"]
    for student in result["students"]:
        for kind in ("last", "best"):
            with safe_open(folder / student[kind], framework="pt") as file:
                assert file.metadata()["recipe_key"] == key
        assert student["top1"] > 0.3
    rows = [json.loads(line) for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["student"], row["epoch"]) for row in rows] == [(name, epoch) for epoch in (1, 2, 3) for name in ("tiny", "small")]
    assert all(row["loss"] > 0 for row in rows)


def test_a_student_among_others_is_the_same_student(folder: Path) -> None:
    """A student that is trained beside another ends with the very weights that it gets alone."""
    kdcache(*TRAIN, "--student", "small", "--out", "pair", cwd=folder)
    kdcache(*TRAIN, "--out", "alone", cwd=folder)
    together, alone = load_file(folder / "pair/tiny/last.safetensors"), load_file(folder / "alone/tiny/last.safetensors")
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def test_killed_training_ends_with_the_same_weights(folder: Path) -> None:
    """A training that is killed after its first epoch and run again ends with the weights of an undisturbed one."""
    kdcache(*TRAIN, "--out", "undisturbed", cwd=folder)
    command = [KDCACHE, *TRAIN, "--out", "killed"]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kdcache(*TRAIN, "--out", "killed", cwd=folder)
    for kind in ("last", "best"):
        killed = load_file(folder / "killed" / "tiny" / f"{kind}.safetensors")
        undisturbed = load_file(folder / "undisturbed" / "tiny" / f"{kind}.safetensors")
        assert all(torch.equal(killed[name], undisturbed[name]) for name in undisturbed)
    assert not (folder / "killed" / "checkpoint.pt").exists()


def test_another_configuration_in_the_same_folder_is_refused(folder: Path) -> None:
    """A run with other settings in the folder of an earlier one exits 3 and lists the settings."""
    kdcache(*TRAIN, "--out", "fixed", cwd=folder)
    refused = kdcache(*TRAIN, "--lr", "0.05", "--out", "fixed", cwd=folder, exits=3)
    assert "lr: 0.1 → 0.05" in refused.stderr


def test_a_finished_run_of_another_cache_is_not_taken_for_this_one(folder: Path, tmp_path: Path) -> None:
    """Where another cache lies at the same path now, the weights of the old one are refused, not given back."""
    shutil.copytree(folder / "cache", tmp_path / "cache")
    arguments = ("train", "--student", "tiny", "--cache", "cache", "--epochs", "1", "--out", "run")
    kdcache(*arguments, cwd=tmp_path)
    assert "finished already" in kdcache(*arguments, cwd=tmp_path).stderr
    shutil.rmtree(tmp_path / "cache")
    dump = ("dump", "--teacher", embedded_teacher(), "--data", "fashion-mini,split=test", "--views", "1", "--codec", "topk,k=3")
    kdcache(*dump, "--out", "cache", cwd=tmp_path)
    assert "recipe_key" in kdcache(*arguments, cwd=tmp_path, exits=3).stderr


def test_configuration_file_environment_and_flags(folder: Path) -> None:
    """Flags beat the environment, which beats --config, which beats defaults; an unknown key exits 2."""
    (folder / "run.toml").write_text("epochs = 1\nbatch-size = 500\nlr = 0.03\nseed = 4\n")
    arguments = ("train", "--student", "tiny", "--cache", "cache", "--config", "run.toml", "--out", "configured", "--lr", "0.02")
    kdcache(*arguments, cwd=folder, KDCACHE_TRAIN_SEED="5", KDCACHE_TRAIN_LR="0.04")
    written = (folder / "configured" / "config.toml").read_text()
    assert re.findall(r"^(?:epochs|batch_size|lr|seed|alpha) = .*$", written, re.M) == [
        "alpha = 0.9", "epochs = 1", "batch_size = 500", "lr = 0.02", "seed = 5",
    ]  # fmt: skip
    (folder / "bad.toml").write_text("epoch = 1\n")
    assert "unknown key epoch" in kdcache(*TRAIN, "--config", "bad.toml", "--out", "bad", cwd=folder, exits=2).stderr


def test_resolved_configuration_repeats_the_run(folder: Path) -> None:
    """The config.toml that a run leaves is accepted by --config and gives the same weights."""
    kdcache(*TRAIN, "--seed", "3", "--out", "first", cwd=folder)
    kdcache("train", "--config", "first/config.toml", "--out", "second", cwd=folder)
    first, second = load_file(folder / "first/tiny/last.safetensors"), load_file(folder / "second/tiny/last.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_changed_dataset_is_refused_and_a_part_is_fine(folder: Path, tmp_path: Path) -> None:
    """Samples that are not in the cache are counted and named; a re-sorted part of the cached set works."""
    refused = kdcache(*TRAIN, "--data", "fashion-mini", "--out", tmp_path / "other", cwd=folder, exits=3)
    assert "of 10000 samples are not in the cache" in refused.stderr
    (tmp_path / "part.py").write_text(
        "from kdcache.learning.datasets import open_dataset\n"
        "from kdcache.records.specs import Spec\n"
        "class Part(list):\n"
        "    classes = range(10)\n"
        "def build(step=1):\n"
        "    whole = open_dataset(Spec.parse('fashion-mini,split=test'), trusted=True)\n"
        "    return Part(whole[row] for row in range(1999, -1, -step))\n"
    )
    part = ("--data", "py:part:build,step=2", "--eval-data", "fashion-mini,split=test")
    kdcache(*TRAIN, *part, "--out", tmp_path / "part", cwd=folder, PYTHONPATH=str(tmp_path))


def test_changed_pixels_are_refused(folder: Path, tmp_path: Path) -> None:
    """A cache whose probes differ from the pixels of today is refused before the first step, unless told otherwise."""
    cache = tmp_path / "cache"
    shutil.copytree(folder / "cache", cache)
    path = cache / "manifest.json"
    manifest = library.Manifest.from_bytes(path.read_bytes(), where="test")
    object.__setattr__(manifest.probes[3], "sha256", "sha256:" + "0" * 64)
    path.write_bytes(manifest.to_bytes())
    arguments = ("train", "--student", "tiny", "--cache", cache, "--epochs", "1", "--out", tmp_path / "run")
    refused = kdcache(*arguments, cwd=folder, exits=3)
    assert "other pixels than the teacher saw" in refused.stderr
    kdcache(*arguments, "--allow-changed-pixels", cwd=folder)


def test_soft_targets_are_the_teachers_answers_to_the_very_views(folder: Path) -> None:
    """The cached log-probabilities are, below the first one's, those of the teacher on the replayed view, within the codec's step."""
    from kdcache.learning.checkpoints import load_model
    from kdcache.learning.datasets import open_dataset
    from kdcache.records.specs import Spec

    cache = library.Cache(folder / "cache")
    teacher = load_model(embedded_teacher(), num_classes=10, image_shape=(1, 28, 28)).model
    dataset = open_dataset(Spec.parse("fashion-mini,split=test"), trusted=True)
    for x, y, soft in cache.batches(dataset, batch_size=500, epochs=2, seed=1):
        with torch.inference_mode():
            live = teacher(x).log_softmax(-1)
        assert soft.index is not None
        kept = live.gather(-1, soft.index)
        kept = kept - kept[:, :1]
        assert (kept - soft.log_probs).abs().median() < 0.01
        assert (kept - soft.log_probs).abs().max() < 0.2
        assert (soft.top1 == y).float().mean() > 0.85


def test_readme_python_example_runs(tmp_path: Path) -> None:
    """The ten lines of Python in the README run as they stand, on the user's own dataset object, and the network learns."""
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"<!-- test:python -->\n```python\n(.*?)```", readme, re.S)
    assert example is not None
    code = example.group(1)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("import")]) <= 12
    names: dict[str, object] = {}
    kdcache("dump", "--teacher", embedded_teacher(), "--data", "fashion-mini", "--views", "2", "--out", "runs/cache", cwd=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    model, images, labels = names["model"], names["images"], names["labels"]
    assert isinstance(model, torch.nn.Module)
    with torch.inference_mode():
        found = model(torch.as_tensor(images) / 255).argmax(-1)
    assert (found == torch.as_tensor(labels)).float().mean() > 0.5  # ten classes; a tenth by chance
