"""The rate-distortion curve of `kdcache plan`: bytes a record against what they do not say, as a figure or a page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from kdcache.records.errors import ConfigError
from kdcache.store.files import write_atomically
from kdcache.workflows.report import COLOURS, draw, inline, render_report, table
from kdcache.workflows.tradeoff import PlannedCodec

SUFFIXES = (".html", ".svg", ".png")
SMALLEST_KL = 1e-7
"""Where lower values are drawn: below it are rounding errors."""


def check_page(out: Path) -> None:
    """Refuses a file that would be of no known kind.

    Raises:
        ConfigError: Another suffix, or a directory.
    """
    if out.suffix not in SUFFIXES or out.is_dir():
        raise ConfigError(f"expected --out to be a file that ends in {', '.join(SUFFIXES)}, found {out}")


def write_page(
    out: Path,
    codecs: Sequence[PlannedCodec],
    *,
    temperature: float,
    kl_bound: float,
    budget_bytes: int | None,
    num_records: int,
    chosen: PlannedCodec | None,
    verdict: str,
    command: str | None,
) -> None:
    """Writes the curve alone (`.svg`, `.png`) or a page with the curve and all numbers (`.html`) that needs no other file.

    Args:
        out: The file.
        codecs: All that were looked at.
        temperature: T of the KL.
        kl_bound: Largest KL that is accepted, in nats.
        budget_bytes: Largest cache that is accepted, or None.
        num_records: Records of the whole cache.
        chosen: The codec that is marked, or None.
        verdict: What is recommended and why.
        command: What to run next, or None.
    """
    figure = _curve(codecs, temperature=temperature, kl_bound=kl_bound, budget_bytes=budget_bytes, num_records=num_records, chosen=chosen)
    if out.suffix != ".html":
        write_atomically(out, draw(figure, "png" if out.suffix == ".png" else "svg"))
        return
    sections = [
        ("Recommended", f"<p>{escape(verdict)}</p>" + (f"<p><code>{escape(command)}</code></p>" if command else "")),
        ("Bytes and fidelity", inline(figure)),
        (f"Codecs, {num_records:,} records", _table(codecs, temperature)),
    ]
    write_atomically(out, render_report("kdcache plan", sections).encode())


def _curve(
    codecs: Sequence[PlannedCodec],
    *,
    temperature: float,
    kl_bound: float,
    budget_bytes: int | None,
    num_records: int,
    chosen: PlannedCodec | None,
) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", ylabel=f"KL at T = {temperature:g}, nats")
    axes.set_xlabel("bytes a record, with its share of keys, labels and profile")

    def place(codec: PlannedCodec) -> tuple[float, float]:
        return codec.cache_bytes / num_records, max(codec.kl_at(temperature), SMALLEST_KL)

    shown = [codec for codec in codecs if codec.kl is not None]
    for position, family in enumerate(dict.fromkeys(codec.family for codec in shown)):
        points = sorted(place(codec) for codec in shown if codec.family == family)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=family, color=COLOURS[position % len(COLOURS)])
    axes.axhline(kl_bound, linestyle="--", color="#888888", label=f"bound, {kl_bound:g} nat")
    if budget_bytes is not None:
        axes.axvline(budget_bytes / num_records, linestyle=":", color="#888888", label=f"budget, {budget_bytes:,} bytes")
    if chosen is not None:
        axes.plot(*place(chosen), "o", markersize=12, fillstyle="none", color="#1a1a1a", label=chosen.codec)
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _table(codecs: Sequence[PlannedCodec], temperature: float) -> str:
    temperatures = list(codecs[0].retained_mass)
    at = f"{temperature:g}"
    header = (
        "codec", "bytes a record", "bytes in all", f"kept at T={at}", *(f"KL at T={t}" for t in temperatures),
        f"its tail at T={at}", "cosine, bucket", "best cosine", "its tail", "hours",
    )  # fmt: skip
    rows = [
        (
            codec.codec,
            f"{codec.record_bytes:,.1f}",
            f"{codec.cache_bytes:,}",
            f"{codec.retained_mass[at]:.2%}",
            *("unbiased" if codec.kl is None else f"{codec.kl[t]:.3g}" for t in temperatures),
            "–" if codec.kl_tail is None else codec.kl_tail[at],
            f"{codec.cosine['bucket']:.3f}",
            f"{codec.cosine[codec.best_tail]:.3f}",
            codec.best_tail if codec.kl_tail else "–",
            f"{codec.hours:.3g}",
        )
        for codec in codecs
    ]
    return f'<div style="overflow-x: auto">{table(header, rows)}</div>'
