"""How long work tells its caller where it is. The library never prints: it calls one of these."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Receives what long work has to tell."""

    def stage(self, name: str, *, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Opens a stage of `total` units; the function that it gives is called with the units done since."""

    def note(self, message: str) -> None:
        """One line that is worth keeping: a block is marked, an epoch has ended."""


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str, *, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Opens a stage and ignores it."""
        return nullcontext(lambda _: None)

    def note(self, message: str) -> None:
        """Ignores the line."""
