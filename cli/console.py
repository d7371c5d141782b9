"""What the user sees: data on stdout, everything else on stderr."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

LOG_EVERY_SECONDS = 10.0


class RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        """For example `1,234 samples/s`."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="dim")


class ConsoleProgress:
    """A progress bar with rate and time left on a terminal, plain log lines elsewhere; always on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars: RichProgress | None = None

    @contextmanager
    def stage(self, name: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Shows a stage of `total` units until the body ends."""
        if not self._console.is_terminal:
            yield _LineLog(self.note, name, total, unit)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
        with RichProgress(*columns, RateColumn(), TimeRemainingColumn(), console=self._console, transient=True) as bars:
            task = bars.add_task(name, total=total, unit=unit)
            yield lambda amount: bars.advance(task, amount)

    def note(self, message: str) -> None:
        """One line on stderr."""
        self._console.print(message, markup=False, soft_wrap=True)


class _LineLog:
    """Says now and then how far a stage is; nothing at all about one that ends soon."""

    def __init__(self, say: Callable[[str], None], name: str, total: int, unit: str) -> None:
        self._say, self._name, self._total, self._unit = say, name, total, unit
        self._started = self._spoke = time.monotonic()
        self._done = 0

    def __call__(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._spoke >= LOG_EVERY_SECONDS:
            self._spoke = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            self._say(f"{self._name}: {self._done:,}/{self._total:,} {self._unit}, {rate:,.0f}/s, {left:.0f} s left")


def emit(result: object, *, as_json: bool, show: Callable[[], None]) -> None:
    """Prints a command's result on stdout: one JSON object, or what `show` prints."""
    if as_json:
        sys.stdout.write(json.dumps(plain(result), ensure_ascii=False) + "\n")
    else:
        show()


def plain(value: Any) -> Any:
    """Records, paths and containers as JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; every column after the first is aligned to the right."""
    table = Table(title=title, title_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 120
    Console(highlight=False, width=width).print(table)


def print_pairs(pairs: dict[str, str]) -> None:
    """`name  value` lines on stdout."""
    width = max(len(name) for name in pairs)
    for name, value in pairs.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def format_bytes(size: int) -> str:
    """For example `1.1 MB`; decimal, as disks are sold."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def format_share(value: float | None) -> str:
    """For example `91.25 %`; a dash for None."""
    return "–" if value is None else f"{value:.2%}".replace("%", " %")
