"""`kdcache merge`."""

from pathlib import Path

import click

import kdcache

from .console import ConsoleProgress, emit, format_bytes, print_pairs
from .options import PATH, json_option

EPILOG = """\b
Examples:
  kdcache merge runs/views-0-7 runs/views-8-15 --out runs/cache
  kdcache merge runs/ann runs/bob runs/eve --out runs/cache --json
"""


@click.command(epilog=EPILOG)
@click.argument("sources", metavar="SOURCE…", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, required=True, help="The new cache's directory; new or empty.")
@json_option
def merge(sources: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Join caches of one recipe that hold different views (dump --views FIRST:STOP) into a new cache.

    The sources are only read. Views that several hold must be equal, none may be missing in between. Running the same command
    again after an interruption goes on.
    """
    result = kdcache.merge(sources, out, progress=ConsoleProgress())
    manifest = result.manifest
    grid = manifest.grid
    summary = {
        "path": result.path,
        "recipe_key": manifest.recipe_key,
        "num_samples": grid.num_samples,
        "first_view": grid.first_view,
        "num_views": grid.num_views,
        "layout": manifest.layout,
        "content": manifest.content,
        "size_bytes": manifest.size_bytes,
        "statistics": manifest.statistics,
        "files_copied": result.files_copied,
    }
    pairs = {
        "cache": str(result.path),
        "recipe key": manifest.recipe_key,
        "holds": f"{grid.num_samples:,} samples × {grid.num_views} views, {format_bytes(manifest.size_bytes)}",
        "content": manifest.content,
    }
    emit(summary, as_json=as_json, show=lambda: print_pairs(pairs))
