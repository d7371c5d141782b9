"""`kdcache evaluate`."""

from pathlib import Path
from typing import Literal

import click

import kdcache

from .console import ConsoleProgress, emit, format_share, print_pairs
from .options import PATH, OneOrSeveral, arch_option, config_option, device_option, ensemble_option, json_option

EPILOG = """\b
Examples:
  kdcache evaluate --model runs/small/small/last.safetensors --data fashion-mini,split=test
  kdcache evaluate --model student.safetensors --teacher teacher.safetensors --data fashion-mini,split=test --json
"""


@click.command(epilog=EPILOG)
@click.option("--model", type=PATH, required=True, help="The model's file.")
@click.option("--data", required=True, help="Dataset spec, such as fashion-mini,split=test.")
@arch_option
@click.option(
    "--teacher", type=OneOrSeveral(), multiple=True, help="A second model: the agreement with it is measured. Several are averaged."
)
@ensemble_option
@click.option("--teacher-arch", type=OneOrSeveral(), multiple=True, help="The teacher's architecture where its file does not say it.")
@click.option("--input-size", help="Pixels of the images that the model gets, 160 or 160x192; by default what its file says.")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Samples in a forward pass.")
@device_option
@config_option
@json_option
def evaluate(
    model: Path, data: str, arch: str | None, teacher: tuple[str, ...], teacher_arch: tuple[str, ...], ensemble: Literal["logits", "probabilities"],
    input_size: str | None, batch_size: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure a network on a dataset: accuracy, recall, calibration, agreement with a teacher."""
    result = kdcache.evaluate(
        model, data, arch=arch, teacher=teacher or None, teacher_arch=teacher_arch, ensemble=ensemble, input_size=input_size,
        batch_size=batch_size, device=device, progress=ConsoleProgress(),
    )  # fmt: skip
    pairs = {
        "samples": f"{result.num_samples:,}",
        "top-1": format_share(result.top1),
        "top-5": format_share(result.top5),
        "macro recall": format_share(result.recall),
        "calibration error": format_share(result.calibration_error),
        "agreement with teacher": format_share(result.agreement),
        "parameters": f"{result.num_parameters:,}",
    }
    emit(result, as_json=as_json, show=lambda: print_pairs(pairs))
