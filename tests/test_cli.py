"""The command line: help, JSON, exit codes, words of errors."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from commands import KDCACHE, environment, kdcache, kdcache_json
from kdcache.data import embedded_teacher

COMMANDS = ("demo", "fit", "plan", "dump", "train", "evaluate", "info", "verify", "convert", "pack", "unpack", "merge", "models", "augment")


def test_help_lists_every_command(tmp_path: Path) -> None:
    """`kdcache --help` lists the commands in the order of the work."""
    shown = kdcache("--help", cwd=tmp_path).stdout
    positions = [shown.index(f"\n  {command} ") for command in COMMANDS]
    assert positions == sorted(positions)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(tmp_path: Path, command: str) -> None:
    """Each command's help ends with two examples or more, and knows --json."""
    shown = kdcache(command, "--help", cwd=tmp_path).stdout
    examples = shown[shown.index("Examples:") :]
    assert len(re.findall(rf"^ +kdcache {command}\b", examples, re.M)) >= 2
    assert "--json" in shown


def test_examples_parse(tmp_path: Path) -> None:
    """Every option in the examples of the help exists: none ends in a usage error (exit 2 by click)."""
    for command in COMMANDS:
        shown = kdcache(command, "--help", cwd=tmp_path).stdout
        examples = shown[shown.index("Examples:") :].replace("\\\n", " ")
        known = set(re.findall(r"--[a-z-]+", shown[: shown.index("Examples:")]))
        assert set(re.findall(r"--[a-z-]+", examples)) <= known


def test_usage_errors_exit_2(tmp_path: Path) -> None:
    """A missing option, an unknown command and a wrong value exit 2 and say so on stderr."""
    for arguments, words in (
        (("fit", "--data", "fashion-mini"), "Missing option"),
        (("distil",), "No such command"),
        (("train", "--student", "small", "--cache", "c", "--out", "o", "--tail", "none"), "Invalid value"),
        (("train", "--student", "small", "--cache", "c", "--out", "o", "--alpha", "2"), "alpha=2"),
        (("fit", "--model", "huge", "--data", "fashion-mini", "--out", "m.safetensors"), "unknown model 'huge'"),
        (("fit", "--model", "tiny", "--data", "mnist", "--out", "m.safetensors"), "unknown dataset 'mnist'"),
        (("fit", "--model", "tiny", "--data", "fashion-mini,split=dev", "--out", "m.safetensors"), "no split 'dev'"),
        (("info", "nowhere"), "no cache at nowhere"),
    ):
        done = kdcache(*arguments, cwd=tmp_path, exits=2)
        assert words in done.stderr
        assert done.stdout == ""


def test_teacher_errors(tmp_path: Path) -> None:
    """A missing teacher, a bare state dict, a wrong architecture and another class count each have their own words."""
    teacher = embedded_teacher()
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    dump = ("dump", "--data", "fashion-mini", "--out", "cache")
    for arguments, words in (
        (("--teacher", "gone.pt"), "no model file at gone.pt"),
        (("--teacher", "bare.pt"), "add --arch SPEC"),
        (("--teacher", "bare.pt", "--arch", "tiny"), "unexpected (2): weight, bias"),
        (("--teacher", teacher, "--arch", "large,num_classes=7"), "7 classes"),
    ):
        assert words in kdcache(*dump, *arguments, cwd=tmp_path, exits=3).stderr
    assert not (tmp_path / "cache").exists()


def test_fit_evaluate_and_json(tmp_path: Path) -> None:
    """Fit makes a model, goes on where it was, and evaluate measures it; with --json stdout is one JSON object."""
    fit = ("fit", "--model", "tiny", "--data", "fashion-mini,split=test", "--epochs", "2", "--out", "tiny.safetensors")
    first = kdcache_json(*fit, cwd=tmp_path)
    assert first["epochs"] == 2
    again = kdcache(*fit, "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == first
    assert "finished already" in again.stderr
    score = kdcache_json("evaluate", "--model", "tiny.safetensors", "--data", "fashion-mini,split=test",
                         "--teacher", embedded_teacher(), cwd=tmp_path)  # fmt: skip
    assert score["num_samples"] == 2000
    assert score["top1"] == pytest.approx(first["top1"])
    assert 0 < score["agreement"] <= 1
    assert 0 < score["calibration_error"] < 1


def test_embedded_teacher_is_as_good_as_promised(tmp_path: Path) -> None:
    """The embedded teacher has at least 92 % on the embedded test images and is at most 3 MB."""
    score = kdcache_json("evaluate", "--model", embedded_teacher(), "--data", "fashion-mini,split=test", cwd=tmp_path)
    assert score["top1"] >= 0.92
    assert embedded_teacher().stat().st_size <= 3_000_000


def test_models_lists_presets_and_torchvision(tmp_path: Path) -> None:
    """Models lists the presets with their parameters, and with --all torchvision's networks."""
    specs = {item["spec"]: item["num_parameters"] for item in kdcache_json("models", "--all", cwd=tmp_path)["models"]}
    assert specs["tiny"] < specs["small"] < specs["medium"] < specs["large"]
    assert "torchvision:resnet50" in specs


def test_errors_of_the_system_are_one_line(tmp_path: Path) -> None:
    """A path that cannot be written exits 1 with the system's own words and no traceback."""
    (tmp_path / "file").write_text("")
    fit = ("fit", "--model", "tiny", "--data", "fashion-mini,split=test", "--epochs", "1", "--out", "file/below.safetensors")
    assert "file" in kdcache(*fit, cwd=tmp_path, exits=1).stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """--debug shows where an error comes from."""
    command = [KDCACHE, "--debug", "info", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path) -> None:
    """On a terminal a stage shows a bar with rate and time left; in a pipe there is no control character."""
    command = f"{KDCACHE} evaluate --model {embedded_teacher()} --data fashion-mini"
    terminal = subprocess.run(
        ["script", "-qec", command, "/dev/null"], cwd=tmp_path, env=environment(TERM="xterm"), capture_output=True, text=True, check=True
    )
    assert "samples/s" in terminal.stdout
    assert "━" in terminal.stdout
    piped = kdcache(*command.split()[1:], cwd=tmp_path)
    assert "\x1b" not in piped.stderr + piped.stdout


@pytest.mark.slow
def test_demo_makes_everything_it_names(tmp_path: Path) -> None:
    """A short demo prints the table and leaves cache, students, metrics and a report that needs nothing from elsewhere."""
    result = kdcache_json("demo", "--epochs", "2", cwd=tmp_path)
    assert [row["name"] for row in result["rows"]] == ["teacher (large)", "small, from the cache", "small, without it"]
    assert result["cache_bytes"] < result["float32_bytes"] / 2
    rows = [json.loads(line) for line in (tmp_path / result["metrics"]).read_text().splitlines()]
    assert len(rows) == 4
    for path in (*result["students"], result["report"]):
        assert (tmp_path / path).stat().st_size > 0
    page = (tmp_path / result["report"]).read_text()
    assert page.count("<svg") == 2
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)
    shown = kdcache("demo", "--epochs", "2", cwd=tmp_path).stdout
    for words in ("agrees with teacher", "full float32 logits", "report.html", "metrics.jsonl"):
        assert words in shown
    kdcache("verify", tmp_path / result["cache"], cwd=tmp_path)
