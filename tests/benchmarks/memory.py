"""Peak memory of a dump and of a training as the dataset grows tenfold, and how long a million-record cache takes to open.

Run: python tests/benchmarks/memory.py            (about ten minutes on two cores; prints Markdown)
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import machine, make_store, realistic_blocks, table

from kdcache.learning.checkpoints import save_model
from kdcache.learning.models import build_model
from kdcache.records.specs import Spec
from kdcache.targets.codecs import make_codec

SIZES = (10_000, 100_000)
CLASSES = 1000


class Drawn:
    """Images that are made when they are asked for: a dataset of any size that takes no memory."""

    def __init__(self, num_samples: int) -> None:
        self.classes, self._num_samples = range(CLASSES), num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self._num_samples:
            raise IndexError(index)
        pixels = torch.arange(64, dtype=torch.int64) * (index + 1) * 2654435761
        return (pixels >> 16).to(torch.uint8).reshape(1, 8, 8), index % CLASSES


def measured(code: str, **values: object) -> dict[str, float]:
    """Runs code in a fresh process; gives the seconds that it took and the process's peak memory in MB."""
    script = f"""
import json, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
import kdcache, kdcache.workflows.train, kdcache.workflows.dump
import numpy as np
values = {values!r}
started = time.perf_counter()
{code}
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({{"seconds": time.perf_counter() - started, "peak": peak}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


DUMP = """kdcache.dump(Path(values["teacher"]), values["data"], Path(values["out"]), views=1, augment="none", codec="topk,k=16", device="cpu")"""
TRAIN = """kdcache.train(["tiny"], Path(values["out"]), Path(values["run"]), data=values["data"],
    options=kdcache.TrainingOptions(epochs=1, device="cpu", lr=0.01))"""
OPEN = """
cache = kdcache.Cache(Path(values["out"]))
if values["verify"]:
    cache.reader.verify_all()
cache.soft_targets(np.random.default_rng(0).integers(0, cache.manifest.grid.num_samples, 256), np.zeros(256, np.int64))
"""


def growth(folder: Path) -> Iterator[str]:
    """Peak memory of both stages for each size."""
    spec = Spec.parse(f"tiny,channels=1,image_size=8,num_classes={CLASSES}")
    save_model(folder / "teacher.safetensors", build_model(spec, trusted=True), spec=spec, metadata={})
    for size in SIZES:
        values = {"teacher": f"{folder}/teacher.safetensors", "data": f"py:memory:Drawn,num_samples={size}",
                  "out": f"{folder}/cache-{size}", "run": f"{folder}/run-{size}"}  # fmt: skip
        dumped, trained = measured(DUMP, **values), measured(TRAIN, **values)
        yield f"{size:,} | {dumped['peak']:.0f} | {trained['peak']:.0f} | {dumped['seconds']:.0f} | {trained['seconds']:.0f}"


def opening(folder: Path) -> Iterator[str]:
    """Seconds from the import's end to the first batch of soft targets."""
    make_store(folder / "million", make_codec(Spec.parse("topk,k=16"), num_classes=CLASSES), realistic_blocks(16), num_blocks=16)
    for title, verify, cold in (
        ("cold", False, True),
        ("warm", False, False),
        ("cold, every file verified", True, True),
        ("warm, every file verified", True, False),
    ):
        if cold:
            for path in (folder / "million").rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        runs = [measured(OPEN, out=f"{folder}/million", verify=verify) for _ in range(1 if cold else 3)]
        yield f"{title} | {sorted(run['seconds'] for run in runs)[len(runs) // 2]:.3f} s | {runs[0]['peak']:.0f} MB"


def main() -> None:
    """Prints the tables."""
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        table("samples|peak of the dump, MB|peak of the training, MB|dump, s|training, s", growth(Path(name)))
        table("a million records, k=16 of 1000: from opening to the first batch of 256|time|peak of the process", opening(Path(name)))


if __name__ == "__main__":
    main()
