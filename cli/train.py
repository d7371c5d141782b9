"""`kdcache train`."""

from pathlib import Path
from typing import Any

import click

import kdcache

from .console import ConsoleProgress, emit, format_share, print_table
from .options import PATH, config_option, json_option, training_options

EPILOG = """\b
Examples:
  kdcache train --student small --cache runs/cache --out runs/small
  kdcache train --student tiny --student torchvision:resnet18 --cache runs/cache --temperature 2 --out runs/two
"""


@click.command(epilog=EPILOG)
@click.option("--student", "student", multiple=True, required=True, help="Model spec; repeat it for several in one pass.")
@click.option("--cache", type=PATH, required=True, help="The cache's directory.")
@click.option("--out", type=PATH, required=True, help="Folder for weights, metrics and configuration.")
@click.option("--data", help="Dataset spec, if the cached set lies elsewhere now; a re-sorted set or a part of it is fine.")
@click.option("--eval-data", help="Held-out dataset spec; by default the dataset's own test split.")
@click.option("--temperature", type=float, default=4.0, show_default=True, help="Temperature of the KD loss; any.")
@click.option("--alpha", type=float, default=0.9, show_default=True, help="Weight of the KD loss.")
@click.option("--hard", type=float, default=0.0, show_default=True, help="Weight of the teacher's hard label.")
@click.option("--tail", type=click.Choice(["bucket", "uniform", "profile", "renormalize"]), default="bucket", show_default=True,
              help="What stands for the classes that were not kept.")  # fmt: skip
@click.option("--order", type=click.Choice(["auto", "random", "windows"]), default="auto", show_default=True,
              help="Order of the samples; windows reads a few ranges at a time, for stores without quick random access.")  # fmt: skip
@click.option("--view-order", type=click.Choice(["auto", "cycle", "random"]), default="auto", show_default=True,
              help="How a sample's views follow each other; auto: a cycle, or random ones of --views all.")  # fmt: skip
@click.option("--views-per-load", type=click.IntRange(min=1), default=1, show_default=True,
              help="Views made of each decoded sample for one batch; more decode less.")  # fmt: skip
@click.option("--input-size", help="Pixels of the students' images, 160 or 160x192; by default those of the shared views.")
@click.option("--allow-changed-pixels", is_flag=True,
              help="Train even if the students would see other pixels than the teacher saw.")  # fmt: skip
@click.option("--skip-unknown", is_flag=True, help="Leave out samples that are not in the cache: changed or added ones.")
@training_options
@config_option
@json_option
def train(
    student: tuple[str, ...], cache: Path, out: Path, data: str | None, eval_data: str | None,
    temperature: float, alpha: float, hard: float, tail: Any, order: Any,
    view_order: Any, views_per_load: int, input_size: str | None, allow_changed_pixels: bool, skip_unknown: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train students from a cache; the teacher is not needed.

    Dataset and views come from the cache. Running the same command again goes on where the last run was cut off.
    """
    result = kdcache.train(
        list(student), cache, out, data=data, eval_data=eval_data,
        distillation=kdcache.DistillationOptions(temperature=temperature, alpha=alpha, hard=hard, tail=tail),
        options=kdcache.TrainingOptions(**options),
        order=order,
        view_order=view_order,
        views_per_load=views_per_load,
        input_size=input_size,
        allow_changed_pixels=allow_changed_pixels,
        skip_unknown=skip_unknown,
        progress=ConsoleProgress(),
    )  # fmt: skip
    summary = {"students": result.students, "metrics": result.metrics}
    rows = [[item.name, format_share(item.top1), str(item.last), str(item.best)] for item in result.students]
    emit(summary, as_json=as_json, show=lambda: print_table("students", ["", "top-1", "last", "best"], rows))
