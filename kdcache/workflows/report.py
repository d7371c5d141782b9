"""A report that is one HTML file: tables and curves, nothing fetched from anywhere."""

import io
from collections.abc import Sequence
from html import escape
from typing import Literal

from matplotlib import rc_context
from matplotlib.figure import Figure

from kdcache.workflows.runs import Row

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; } code { background: #f3f3f3; padding: .1rem .3rem; }
"""
COLOURS = ("#0b6e4f", "#c8553d", "#3b6ea5", "#8e6c8a", "#6b6b6b")


def render_report(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The page.

    Args:
        title: Heading of the page.
        sections: (heading, HTML) pairs, as `table` and `curves` make the HTML.
    """
    body = "\n".join(f"<h2>{escape(heading)}</h2>\n{content}" for heading, content in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def curves(rows: Sequence[Row], *, key: str, label: str, reference: tuple[str, float] | None = None) -> str:
    """One line a student over the epochs, as inline SVG.

    Args:
        rows: Metrics rows.
        key: Which number to draw; rows without it are passed over.
        label: What it is, with its unit.
        reference: Name and height of a dashed line, such as the teacher's accuracy.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["student"] for row in rows if key in row))
    for position, name in enumerate(names):
        points = [(row["epoch"], row[key]) for row in rows if row["student"] == name and key in row]
        axes.plot(*zip(*points, strict=True), label=name, color=COLOURS[position % len(COLOURS)])
    if reference is not None:
        axes.axhline(reference[1], linestyle="--", color="#888888", label=reference[0])
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return inline(figure)


def inline(figure: Figure) -> str:
    """A figure as a part of the page."""
    svg = draw(figure, "svg").decode()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def draw(figure: Figure, form: Literal["svg", "png"]) -> bytes:
    """A figure as the content of a file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "kdcache", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=form, dpi=150, metadata={"Date": None, "Creator": None} if form == "svg" else None)
    return buffer.getvalue()
