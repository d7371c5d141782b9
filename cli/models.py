"""`kdcache models`."""

import click

import kdcache

from .console import emit, print_table
from .options import json_option

EPILOG = """\b
Examples:
  kdcache models
  kdcache models --all --json
"""


@click.command(epilog=EPILOG)
@click.option("--all", "show_all", is_flag=True, help="Torchvision's models too.")
@json_option
def models(show_all: bool, as_json: bool) -> None:
    """The model specs that --model, --student and --arch accept."""
    listings = [listing for listing in kdcache.list_models() if show_all or not listing.spec.startswith("torchvision:")]
    rows = [[item.spec, "" if item.num_parameters is None else f"{item.num_parameters:,}", item.summary] for item in listings]
    header = ["spec", "parameters", "what it is"]
    emit({"models": listings}, as_json=as_json, show=lambda: _show(header, rows, show_all))


def _show(header: list[str], rows: list[list[str]], show_all: bool) -> None:
    print_table("parameters: for ten classes and 28 × 28 grey images", header, rows)
    if not show_all:
        click.echo("and torchvision:NAME for each of torchvision's classification models (--all lists them)")
