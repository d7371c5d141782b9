"""`kdcache info`."""

from pathlib import Path

import click

import kdcache

from .console import emit, format_bytes, format_share, print_pairs
from .options import PATH, json_option

EPILOG = """\b
Examples:
  kdcache info runs/cache
  kdcache info runs/cache --json
"""


@click.command(epilog=EPILOG)
@click.argument("cache", type=PATH)
@json_option
def info(cache: Path, as_json: bool) -> None:
    """What a cache holds: teacher, dataset, views, codec, size, retained mass. Works on an unfinished dump too."""
    result = kdcache.info(cache)
    emit(result, as_json=as_json, show=lambda: print_pairs(_pairs(result)))


def _pairs(result: "kdcache.CacheInfo") -> dict[str, str]:
    recipe = result.recipe
    numbers = f" (numbers {result.first_view} to {result.first_view + result.num_views - 1})" if result.first_view else ""
    pairs = {
        "cache": str(result.path),
        "recipe key": result.recipe_key,
        "teacher": _teacher(recipe.teacher),
        "dataset": f"{recipe.dataset.spec}: {recipe.dataset.num_samples:,} samples, {recipe.teacher.num_classes} classes",
        "views": f"{result.num_views}{numbers} × {_views(recipe.views)}",
        "codec": recipe.codec,
        "blocks": f"{result.blocks_done} of {result.blocks_total}",
    }
    if result.manifest is None:
        return {**pairs, "state": "unfinished; run the same kdcache dump again to go on"}
    if result.growth:
        growth = result.growth
        pairs["growing"] = (
            f"to {growth.num_views} views: {growth.blocks_done} of {growth.blocks_total} blocks; run the same kdcache dump again to go on"
        )
    statistics, provenance = result.manifest.statistics, result.manifest.provenance
    masses = ", ".join(f"{format_share(mass)} at T={t}" for t, mass in statistics.retained_mass.items())
    records = result.manifest.grid.num_samples * result.manifest.grid.num_views
    return {
        **pairs,
        "size": f"{format_bytes(result.size_bytes)}; full float32 logits: {format_bytes(result.float32_bytes)}",
        "records": f"{records:,} of {statistics.entries:.4g} classes and {result.record_bytes:.4g} bytes each",
        "layout": f"{result.manifest.layout}, content {result.manifest.content}",
        "teacher's top-1": f"{format_share(statistics.teacher_accuracy)} on the stored labels",
        "retained mass": masses or "everything",
        "made": f"{provenance.created} by {provenance.created_by} on {provenance.device}",
        "command": provenance.command,
        **_added(result.manifest),
        "licence": result.manifest.license or "not stated",
    }


def _teacher(record: "kdcache.TeacherRecord") -> str:
    """For example `small,… (sha256:1234…, float32)`; of several the average, and each."""
    text = f"{record.spec} ({record.sha256[:19]}…, {record.precision})"
    if not record.members:
        return text
    members = "; ".join(f"{member.spec} ({member.sha256[:19]}…)" for member in record.members)
    return f"average of {record.ensemble} of {len(record.members)} teachers ({record.precision}): {members}"


def _views(record: "kdcache.ViewsRecord") -> str:
    """How a view is made, in a line."""
    operations = " → ".join(str(operation["op"]) for operation in record.pipeline) or "none"
    mixing = record.mixing
    kinds = [f"{name} {alpha:g}" for name, alpha in (("mixup", mixing.mixup), ("cutmix", mixing.cutmix)) if alpha] if mixing else []
    mixed = f", mixed by {' or '.join(kinds)} ({format_share(mixing.probability)} of them)" if mixing else ""
    end = "".join(f" → {operation['op']}" for operation in record.teacher_end)
    return f"{operations}{mixed}{f', then for the teacher{end}' if end else ''} ({'all there are' if record.enumerated else f'seed {record.seed}'})"


def _added(manifest: "kdcache.Manifest") -> dict[str, str]:
    """Which views came later, one line for all."""
    added = [
        f"views {entry.views[0]} to {entry.views[1] - 1} by {entry.created_by}, {entry.created}"
        for entry in manifest.history
        if entry.views
    ]
    return {"added": "; ".join(added)} if added else {}
