"""`kdcache pack`."""

from pathlib import Path

import click

from .convert import convert_and_show
from .options import PATH, json_option

EPILOG = """\b
Examples:
  kdcache pack runs/cache runs/packed
  kdcache pack runs/cache /archive/cache --json
"""


@click.command(epilog=EPILOG)
@click.argument("source", type=PATH)
@click.argument("destination", type=PATH)
@json_option
def pack(source: Path, destination: Path, as_json: bool) -> None:
    """Copy a cache into its smallest layout, for archives and the wire: kdcache convert --format compact."""
    convert_and_show(source, destination, layout="compact", as_json=as_json)
