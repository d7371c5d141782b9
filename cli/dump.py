"""`kdcache dump`."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

import kdcache

from .console import ConsoleProgress, emit, format_bytes, format_share, print_pairs
from .options import PATH, config_option, device_option, ensemble_option, json_option, teacher_arch_option, teacher_option

EPILOG = """\b
Examples:
  kdcache dump --teacher teacher.safetensors --data fashion-mini --out runs/cache
  kdcache dump --teacher ckpt.pt --arch torchvision:resnet50 --data torchvision:CIFAR100,root=DIR \\
      --views 8 --augment rrc-flip --codec topk,k=16 --out runs/cache
  kdcache dump --teacher teacher.safetensors --data fashion-mini --views 16 --out runs/cache       (adds to a cache of 4 views)
  kdcache dump --teacher teacher.safetensors --data fashion-mini --views 8:16 --out runs/views-8-15
  kdcache dump --teacher teacher.safetensors --data fashion-mini --mean-k 3 --out runs/adaptive
  kdcache dump --teacher ckpt.pt --arch torchvision:resnet50 --data folder:images,split=train --augment rrc-flip,size=224 \\
      --skip-unreadable --out runs/folder
  kdcache dump --teacher a.safetensors --teacher b.pt2 --ensemble probabilities --data fashion-mini --out runs/both
  kdcache dump --teacher net.onnx --arch onnx,norm=imagenet --data folder:images --augment rrc-flip,size=224 --out runs/onnx
  kdcache dump --teacher py:mylab.nets:build,width=2 --data fashion-mini --out runs/mine
"""


@click.command(epilog=EPILOG)
@teacher_option
@click.option(
    "--data",
    required=True,
    help="fashion-mini, folder:PATH[,split=train], torchvision:NAME,root=DIR, hf:NAME, parquet:FILE, csv:FILE or py:…",
)
@click.option("--out", type=PATH, required=True, help="The cache's directory.")
@teacher_arch_option
@ensemble_option
@click.option("--views", default="4", show_default=True,
              help="Views of each sample, or all; more than a cache in --out has: they are added. FIRST:STOP: a part, to be merged.")  # fmt: skip
@click.option("--augment", default="crop-flip", show_default=True, help="Name or TOML file; see kdcache augment.")
@click.option("--codec", default="auto", show_default=True,
              help="topk[,k=…], adaptive[,mean_k=…|,kl=…], sampled[,draws=…], dense[,dtype=…] or auto; kdcache plan compares them.")  # fmt: skip
@click.option("--mean-k", type=float, help="Codec adaptive: classes that a record keeps on average.")
@click.option("--kl", type=float, help="Codec adaptive: mean KL in nats that may be left.")
@click.option("--format", "layout", type=click.Choice(["zarr", "parquet"]), default="zarr", show_default=True,
              help="How records lie in files: zarr to train from, parquet for other tools.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the views.")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Samples in a forward pass.")
@click.option("--block-samples", type=click.IntRange(min=1), help="Samples in a chunk file; by default by the dataset's size.")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
              help="Arithmetic; auto: bfloat16 on CUDA, else float32.")  # fmt: skip
@click.option("--license", help="Licence of the labels, such as CC-BY-4.0.")
@click.option("--skip-unreadable", is_flag=True,
              help="Read every sample first; leave out, and record, those that cannot be read.")  # fmt: skip
@device_option
@config_option
@json_option
def dump(
    teacher: tuple[str, ...], data: str, out: Path, codec: str, mean_k: float | None, kl: float | None, as_json: bool, **options: Any
) -> None:
    """Run the teacher once over every view and store its soft labels.

    Running the same command again goes on where the last run was cut off, and ends in the same bytes. With more --views it adds
    the missing ones to the cache, which can be trained from all the while.
    """
    command = shlex.join(["kdcache", *sys.argv[1:]])
    targets = [f",{name}={value}" for name, value in (("mean_k", mean_k), ("kl", kl)) if value is not None]
    codec = "".join(["adaptive" if targets and codec == "auto" else codec, *targets])
    result = kdcache.dump(teacher, data, out, codec=codec, command=command, progress=ConsoleProgress(), **options)
    manifest = result.manifest
    summary = {
        "path": result.path,
        "recipe_key": manifest.recipe_key,
        "num_samples": manifest.grid.num_samples,
        "first_view": manifest.grid.first_view,
        "num_views": manifest.grid.num_views,
        "codec": manifest.recipe.codec,
        "size_bytes": manifest.size_bytes,
        "statistics": manifest.statistics,
        "blocks": len(manifest.blocks),
        "blocks_computed": result.blocks_computed,
    }
    pairs = {
        "cache": str(result.path),
        "recipe key": manifest.recipe_key,
        "holds": f"{manifest.grid.num_samples:,} samples × {manifest.grid.num_views} views, {format_bytes(manifest.size_bytes)}",
        "teacher": f"{format_share(manifest.statistics.teacher_accuracy)} top-1 on the stored labels",
    }
    emit(summary, as_json=as_json, show=lambda: print_pairs(pairs))
