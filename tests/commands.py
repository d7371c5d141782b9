"""Runs the installed command, as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

KDCACHE = Path(sys.executable).with_name("kdcache")


def environment(**extra: str) -> dict[str, str]:
    """The environment without settings that would change what a command does; with one thread, as tests may run side by side."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KDCACHE_")}
    return {**inherited, "SOURCE_DATE_EPOCH": "1700000000", "COLUMNS": "120", "OMP_NUM_THREADS": "1", **extra}


def kdcache(*arguments: str | Path, cwd: Path, exits: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and checks its exit code."""
    command = [str(KDCACHE), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == exits, f"{command} gave {done.returncode}, expected {exits}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def kdcache_json(*arguments: str | Path, cwd: Path, **extra: str) -> Any:
    """The JSON object that a command prints with `--json`."""
    return json.loads(kdcache(*arguments, "--json", cwd=cwd, **extra).stdout)
