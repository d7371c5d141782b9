"""`kdcache fit`."""

from pathlib import Path
from typing import Any

import click

import kdcache

from .console import ConsoleProgress, emit, format_share, print_pairs
from .options import PATH, config_option, json_option, training_options

EPILOG = """\b
Examples:
  kdcache fit --model small --data fashion-mini --epochs 5 --out runs/plain.safetensors
  kdcache fit --model large --data torchvision:FashionMNIST,root=DIR --out teacher.safetensors
"""


@click.command(epilog=EPILOG)
@click.option("--model", required=True, help="Model spec; see: kdcache models.")
@click.option("--data", required=True, help="Dataset spec, such as fashion-mini.")
@click.option("--out", type=PATH, required=True, help="The .safetensors file to make.")
@click.option("--augment", default="crop-flip", show_default=True, help="Name or TOML file; see kdcache augment.")
@click.option("--eval-data", help="Held-out dataset spec; by default the dataset's own test split.")
@training_options
@config_option
@json_option
def fit(model: str, data: str, out: Path, augment: str, eval_data: str | None, as_json: bool, **options: Any) -> None:
    """Train a network on labels alone.

    Makes teachers, and the students without distillation to compare with. Running the same command again goes on
    where the last run was cut off.
    """
    result = kdcache.fit(
        model, data, out, augment=augment, eval_data=eval_data,
        options=kdcache.TrainingOptions(**options), progress=ConsoleProgress(),
    )  # fmt: skip
    summary = {"model": result.model, "metrics": result.metrics, "top1": result.top1, "epochs": len(result.rows)}
    pairs = {"model": str(result.model), "metrics": str(result.metrics), "top-1": format_share(result.top1)}
    emit(summary, as_json=as_json, show=lambda: print_pairs(pairs))
