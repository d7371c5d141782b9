"""What all tests share: tensor shapes are enforced, and the installed command is at hand."""

import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import install_import_hook


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks a function's annotations at every call.

    Two kinds of hint mean something to mypy alone, and beartype refuses them on a single method: protocols are made
    checkable first, and `Self` is left to mypy.
    """
    for name, hint in function.__annotations__.items():
        for part in (hint, *typing.get_args(hint)):
            if getattr(part, "_is_protocol", False):
                typing.runtime_checkable(part)
        if hint is typing.Self:
            function.__annotations__[name] = Any
    return beartype(function)


HOOKED = ("kdcache.targets", "kdcache.learning")
assert not any(name.startswith(HOOKED) for name in sys.modules), "imported before the shapes could be enforced"
install_import_hook(list(HOOKED), f"{__name__}.checked")
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def kdcache_command() -> Path:
    """The installed entry point, beside the Python that runs the tests."""
    command = Path(sys.executable).with_name("kdcache")
    assert command.is_file(), f"{command} is missing; install the package: pip install -e '.[test]'"
    return command
