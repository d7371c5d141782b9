"""What all tests share: tensor shapes are enforced, and the installed command is at hand."""

import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook
from torch import Tensor

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as mypy has it


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
    return _beartype(function)


HOOKED = ("kdcache.targets", "kdcache.learning")
assert not any(name.startswith(HOOKED) for name in sys.modules), "imported before the shapes could be enforced"
install_import_hook(list(HOOKED), f"{__name__}.checked")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported: nothing is fetched
torch.set_num_threads(1)  # tensors are small here: a second thread costs more than it gives, many times so on a busy machine


@pytest.fixture(scope="session", autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What kdcache keeps for the user lies elsewhere while tests run."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("user-cache"))


@pytest.fixture(scope="session")
def kdcache_command() -> Path:
    """The installed entry point, beside the Python that runs the tests."""
    command = Path(sys.executable).with_name("kdcache")
    assert command.is_file(), f"{command} is missing; install the package: pip install -e '.[test]'"
    return command


@pytest.fixture(scope="session")
def teacher_logits() -> Callable[..., Tensor]:
    """Makes logits as a trained network gives them, of any shape: noise, and one class that stands out more or less."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        favourite = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
        surplus = 15 * torch.rand(*shape[:-1], 1, generator=generator)
        return (2 * torch.randn(*shape, generator=generator)).scatter_add(-1, favourite, surplus)

    return make


@pytest.fixture(scope="session")
def keep_exactly() -> Callable[..., Any]:
    """Makes soft targets of the k largest logits with exact log-probabilities and tail masses, in the logits' own precision."""
    from kdcache.targets.soft_targets import SoftTargets

    def keep(logits: Tensor, k: int, *, temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)) -> SoftTargets:
        log_probs, index = logits.log_softmax(-1).topk(k, dim=-1)
        rest = [(logits / t).softmax(-1).scatter(-1, index, 0).sum(-1) for t in temperatures]
        return SoftTargets(
            log_probs=log_probs, index=index, tail_mass=torch.stack(rest, -1), temperatures=temperatures, num_classes=logits.shape[-1]
        )

    return keep
