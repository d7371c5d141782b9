"""`kdcache plan`."""

from typing import Any

import click

import kdcache

from .console import ConsoleProgress, emit, format_bytes, format_share, print_pairs, print_table
from .options import PATH, config_option, device_option, ensemble_option, json_option, teacher_arch_option, teacher_option

EPILOG = """\b
Examples:
  kdcache plan --teacher teacher.safetensors --data fashion-mini --views 8 --budget 1GB --out plan.html
  kdcache plan --teacher ckpt.pt --arch torchvision:resnet50 --data torchvision:CIFAR100,root=DIR \\
      --temperature 2 --codec topk,k=16 --codec adaptive,mean_k=12,temperature=2
"""


@click.command(epilog=EPILOG)
@teacher_option
@click.option("--data", required=True, help="Dataset spec, such as fashion-mini.")
@teacher_arch_option
@ensemble_option
@click.option("--samples", type=click.IntRange(min=1), default=512, show_default=True, help="Samples that the teacher answers.")
@click.option("--views", type=click.IntRange(min=1), default=4, show_default=True, help="Views of each sample in the cache.")
@click.option("--augment", default="crop-flip", show_default=True, help="Name or TOML file; see kdcache augment.")
@click.option("--temperature", type=float, default=4.0, show_default=True, help="Temperature of the students' KD loss.")
@click.option("--budget", metavar="SIZE", help="Largest cache: 1GB, 500MB, 2GiB or bytes; by default any.")
@click.option("--kl", type=float, default=0.05, show_default=True, help="Largest KL(full ‖ cached) at this temperature, in nats.")
@click.option("--codec", "codecs", multiple=True, help="Codec spec; repeat it for several. By default a choice by the number of classes.")
@click.option("--out", type=PATH, help="Where to write the curve: .html with all numbers, .svg or .png.")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Samples in a forward pass.")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
              help="Arithmetic; auto: bfloat16 on CUDA, else float32.")  # fmt: skip
@device_option
@config_option
@json_option
def plan(teacher: tuple[str, ...], data: str, as_json: bool, **options: Any) -> None:
    """What a cache would cost and keep, codec by codec, before any GPU hour.

    Runs the teacher over a few samples and names the smallest codec that keeps enough of its answers, and the dump to run next.
    """
    result = kdcache.plan(teacher, data, progress=ConsoleProgress(), **options)
    emit(result, as_json=as_json, show=lambda: _show(result))


def _show(result: "kdcache.PlanResult") -> None:
    at, temperatures = f"{result.temperature:g}", list(result.codecs[0].retained_mass)
    print_table(
        f"means over {result.num_measured:,} records. KL(full ‖ cached) in nats; codecs that draw have none, their gradient is unbiased.\n"
        f"cosine: gradient at T={at} from the cache, tail policy bucket, and from the full answers; then the best policy",
        ["codec", "bytes", "cache", "kept", *(f"KL T={t}" for t in temperatures), "cosine", "best"],
        [_row(codec, temperatures, at, marked=codec is result.chosen) for codec in result.codecs],
    )
    chosen = result.chosen or min(result.codecs, key=lambda codec: codec.cache_bytes)
    pairs = {
        "records": f"{result.num_samples:,} samples × {result.num_views} views = {result.num_samples * result.num_views:,}",
        "teacher": f"{format_share(result.teacher_accuracy)} top-1 on the labels of the measured samples",
        "time": f"{_format_hours(chosen.hours)} at {chosen.views_per_second:,.0f} views/s on this machine",
        "verdict": result.verdict,
        "next": result.command or "–",
    }
    print_pairs(pairs if result.out is None else {**pairs, "curve": str(result.out)})


def _row(codec: "kdcache.PlannedCodec", temperatures: list[str], at: str, *, marked: bool) -> list[str]:
    """One codec; at the plan's temperature the KL has its tail policy beside it."""
    tails = codec.kl_tail or {}
    best = codec.best_tail
    return [
        f"{'→' if marked else ' '} {codec.codec}",
        f"{codec.record_bytes:.4g}" if codec.record_bytes < 1000 else f"{codec.record_bytes:,.0f}",
        format_bytes(codec.cache_bytes),
        f"{codec.retained_mass[at]:.0%}",
        *("–" if codec.kl is None else _format_kl(codec.kl[t]) + (f" {tails[t]}" if t == at and tails else "") for t in temperatures),
        f"{codec.cosine['bucket']:.3f}",
        best if best == "bucket" and len(codec.cosine) > 1 else "–" if len(codec.cosine) == 1 else f"{codec.cosine[best]:.3f} {best}",
    ]


def _format_kl(nats: float) -> str:
    return f"{nats:.3f}" if nats >= 0.001 else "<0.001"


def _format_hours(hours: float) -> str:
    """For example `3.2 h`, `12.5 min`, `8.0 s`."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"
