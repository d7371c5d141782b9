"""`kdcache convert`, and what `kdcache pack` and `kdcache unpack` share with it."""

from pathlib import Path

import click

import kdcache

from .console import ConsoleProgress, emit, format_bytes, print_pairs
from .options import PATH, json_option

EPILOG = """\b
Examples:
  kdcache convert runs/cache runs/parquet --format parquet
  kdcache convert runs/parquet runs/mapped --format zarr --json
"""


@click.command(epilog=EPILOG)
@click.argument("source", type=PATH)
@click.argument("destination", type=PATH)
@click.option("--format", "layout", type=click.Choice(["zarr", "parquet", "compact"]), required=True,
              help="zarr: for training. parquet: for other tools. compact: for archives and the wire.")  # fmt: skip
@json_option
def convert(source: Path, destination: Path, layout: str, as_json: bool) -> None:
    """Copy a cache into another layout. The records stay what they are; the destination must be new or empty.

    Running the same command again after an interruption ends in the same bytes.
    """
    convert_and_show(source, destination, layout=layout, as_json=as_json)


def convert_and_show(source: Path, destination: Path, *, layout: str, as_json: bool) -> None:
    """Converts, and prints what came of it."""
    result = kdcache.convert(source, destination, layout=layout, progress=ConsoleProgress())
    summary = {
        "path": result.path,
        "layout": result.manifest.layout,
        "recipe_key": result.manifest.recipe_key,
        "content": result.manifest.content,
        "source_size_bytes": result.source_size_bytes,
        "size_bytes": result.size_bytes,
    }
    pairs = {
        "cache": str(result.path),
        "layout": result.manifest.layout,
        "size": f"{format_bytes(result.size_bytes)}, before: {format_bytes(result.source_size_bytes)}",
        "content": result.manifest.content,
    }
    emit(summary, as_json=as_json, show=lambda: print_pairs(pairs))
