"""`kdcache unpack`."""

from pathlib import Path

import click

from .convert import convert_and_show
from .options import PATH, json_option

EPILOG = """\b
Examples:
  kdcache unpack runs/packed runs/cache
  kdcache unpack /archive/cache runs/cache --json
"""


@click.command(epilog=EPILOG)
@click.argument("source", type=PATH)
@click.argument("destination", type=PATH)
@json_option
def unpack(source: Path, destination: Path, as_json: bool) -> None:
    """Copy a cache of any layout into the one for training: kdcache convert --format zarr."""
    convert_and_show(source, destination, layout="zarr", as_json=as_json)
