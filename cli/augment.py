"""`kdcache augment`."""

import click

import kdcache

from .console import emit, print_pairs
from .options import json_option

EPILOG = """\b
Examples:
  kdcache augment list
  kdcache augment show crop-flip
  kdcache augment show timm-a3 > mine.toml        edit it, then: kdcache dump --augment mine.toml,size=160 …
"""
LIST_EPILOG = """\b
Examples:
  kdcache augment list
  kdcache augment list --json
"""
SHOW_EPILOG = """\b
Examples:
  kdcache augment show rrc-flip > mine.toml
  kdcache augment show timm-a3 --json
"""


@click.group(epilog=EPILOG)
def augment() -> None:
    """The named augmentations: list them, or print one to copy and edit.

    --augment takes NAME or FILE.toml, and options after commas: size=N or size=HEIGHTxWIDTH (what size = "input" means, by default the
    images' own size), mixup=A and cutmix=A (how samples are mixed), probability=P (share of the mixed views). Both commands take --json.
    """


@augment.command(name="list", epilog=LIST_EPILOG)
@json_option
def list_command(as_json: bool) -> None:
    """The named augmentations, in a line each."""
    listings = kdcache.list_augmentations()
    emit({"augmentations": listings}, as_json=as_json, show=lambda: print_pairs({item.name: item.summary for item in listings}))


@augment.command(epilog=SHOW_EPILOG)
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """The TOML of a named augmentation.

    Copy it to a file, edit it, and use it as --augment FILE.toml.
    """
    text = kdcache.augmentation_text(name)
    emit({"name": name, "text": text}, as_json=as_json, show=lambda: click.echo(text, nl=False))
