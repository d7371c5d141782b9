"""`kdcache verify`."""

from pathlib import Path

import click

import kdcache

from .console import ConsoleProgress, emit, format_bytes
from .options import PATH, json_option

EPILOG = """\b
Examples:
  kdcache verify runs/cache
  kdcache verify runs/cache --json
"""


@click.command(epilog=EPILOG)
@click.argument("cache", type=PATH)
@json_option
@click.pass_context
def verify(context: click.Context, cache: Path, as_json: bool) -> None:
    """Compare every byte of a cache with its manifest. Exits 3 and names each bad file and its block if any differs."""
    result = kdcache.verify(cache, progress=ConsoleProgress())
    emit(result, as_json=as_json, show=lambda: _show(result))
    if result.problems:
        context.exit(kdcache.IntegrityError.exit_code)


def _show(result: "kdcache.VerifyResult") -> None:
    if not result.problems:
        click.echo(f"{result.path}: all {result.num_files} files ({format_bytes(result.size_bytes)}) are as they were written")
        return
    click.echo(f"{result.path}: {len(result.problems)} of {result.num_files} files are bad; dump or pull the cache again")
    for problem in result.problems:
        click.echo(f"  {problem}")
