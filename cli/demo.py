"""`kdcache demo`."""

from pathlib import Path

import click

import kdcache

from .console import ConsoleProgress, emit, format_bytes, format_share, print_pairs, print_table
from .options import PATH, config_option, json_option

EPILOG = """\b
Examples:
  kdcache demo
  kdcache demo --out /tmp/demo --seed 1 --json
"""


@click.command(epilog=EPILOG)
@click.option("--out", type=PATH, default=Path("kdcache-demo"), show_default=True, help="Folder for everything.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the students.")
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs of both students; fewer for a quick look.")
@config_option
@json_option
def demo(out: Path, seed: int, epochs: int | None, as_json: bool) -> None:
    """Run the main job on embedded data, in minutes on two CPU cores.

    Checks a teacher, dumps its soft labels, trains a student from the cache and the same student without it, and compares them.
    Running it again goes on where the last run was cut off.
    """
    progress = ConsoleProgress()
    if epochs is None:
        result = kdcache.demo(out, seed=seed, progress=progress)
    else:
        result = kdcache.demo(out, seed=seed, epochs=epochs, progress=progress)
    emit(result, as_json=as_json, show=lambda: _show(result))


def _show(result: "kdcache.DemoResult") -> None:
    scores = [
        [
            row.name,
            format_share(row.evaluation.top1),
            format_share(row.evaluation.recall),
            format_share(row.evaluation.agreement),
            f"{row.evaluation.num_parameters:,}",
        ]
        for row in result.rows
    ]
    print_table("fashion-mini, 2,000 test images", ["", "top-1", "recall", "agrees with teacher", "parameters"], scores)
    smaller = result.float32_bytes / result.cache_bytes
    print_pairs(
        {
            "cache": f"{format_bytes(result.cache_bytes)} for {result.num_records:,} soft labels; full float32 logits:"
            f" {format_bytes(result.float32_bytes)} ({smaller:.1f} times as much)",
            "seconds": ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items()),
            "folder": f"{result.folder}/",
            "  cache": str(result.cache),
            "  students": " ".join(str(path) for path in result.students),
            "  metrics": str(result.metrics),
            "  report": str(result.report),
        }
    )
