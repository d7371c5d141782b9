"""Teachers of every kind: functions of one's own, averages of several, in evaluation mode and without a trace left behind."""

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import kdcache, kdcache_json
from stored import NUM_SAMPLES, Noise
from torch import Tensor, nn

from kdcache.learning.cache import Cache
from kdcache.learning.checkpoints import LoadedModel, network_state, save_model, tensors_digest
from kdcache.learning.models import build_model
from kdcache.learning.teachers import Ensemble, EnsembleModel, Source, load_teachers
from kdcache.records.errors import CheckpointError, ConfigError, KdcacheError, MismatchError, SpecError, TeacherError
from kdcache.records.jsonrecord import to_json
from kdcache.records.specs import Spec
from kdcache.workflows.dump import DumpResult, dump
from kdcache.workflows.evaluate import evaluate
from kdcache.workflows.plan import plan
from kdcache.workflows.replay import replay

NUM_CLASSES = 7
SHAPE = (3, 8, 8)
DATA = f"py:stored:Noise,num_classes={NUM_CLASSES}"
TINY = f"tiny,channels=3,image_size=8,num_classes={NUM_CLASSES}"
HERE = f"py:{__name__}"


class Noisy(nn.Module):
    """A teacher whose answers in training mode depend on the batch and on chance, and which gets worse each time it is seen so."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.head = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 3, 8, 8] to logits."""
        logits: Tensor = self.head(self.dropout(self.norm(images).flatten(1)))
        return logits


class Restless(Noisy):
    """A teacher that puts a part of itself into training mode whenever it is asked."""

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 3, 8, 8] to logits."""
        self.dropout.train()
        return super().forward(images)


def noisy_module() -> Noisy:
    """One in training mode, with running statistics of its own."""
    torch.manual_seed(5)
    module = Noisy()
    module(torch.rand(16, *SHAPE) * 3)
    return module.train()


SHARED = noisy_module()


def shared() -> nn.Module:
    """The same module each time, in training mode."""
    return SHARED


def restless() -> nn.Module:
    """A teacher in eval mode, until it is asked."""
    return Restless().eval()


def brightness(scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """A teacher without weights: a plain function."""
    return lambda images: scale * F.one_hot((images.mean(dim=(1, 2, 3)) * 64).long() % NUM_CLASSES, NUM_CLASSES).float()


def returns_a_list() -> Callable[[Tensor], object]:
    """A function whose answers are no tensor."""
    return lambda images: images.mean(dim=(1, 2, 3)).tolist()


def with_positions() -> Callable[[Tensor], Tensor]:
    """A function whose answers have a position axis."""
    return lambda images: torch.zeros(len(images), 4, NUM_CLASSES)


def number() -> int:
    """No teacher at all."""
    return 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers with weights of their own: a.safetensors, b.safetensors."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        spec = Spec.parse(TINY)
        model = build_model(spec, trusted=True)
        model(torch.rand(8, *SHAPE))
        with torch.no_grad():
            model.body.head.weight.mul_(20)  # type: ignore[union-attr,operator]
        save_model(folder / f"{name}.safetensors", model, spec=spec, metadata={})
    return folder


def loaded(teachers: Source | Sequence[Source], *archs: str, ensemble: Ensemble = "logits") -> LoadedModel:
    """Teachers for noise."""
    return load_teachers(teachers, num_classes=NUM_CLASSES, image_shape=SHAPE, archs=archs, ensemble=ensemble)


def dumped(teachers: Source | Sequence[Source], out: Path, *, ensemble: Ensemble = "logits", arch: str | None = None) -> DumpResult:
    """Two views of noise, everything kept."""
    return dump(
        teachers, DATA, out, arch=arch, ensemble=ensemble, views=2, augment="none", codec="dense,dtype=float32", batch_size=8, device="cpu"
    )


def answers(root: Path) -> Tensor:
    """The stored log-probabilities of the first view, [samples, classes]."""
    return Cache(root).soft_targets(np.arange(NUM_SAMPLES), np.zeros(NUM_SAMPLES, np.int64)).log_probs


def noise() -> Tensor:
    """The dataset's images in [0, 1]."""
    dataset = Noise(num_classes=NUM_CLASSES)
    return torch.stack([dataset[i][0] for i in range(NUM_SAMPLES)]).float() / 255


def test_a_teacher_in_training_mode_answers_in_eval_mode(tmp_path: Path) -> None:
    """A module that is handed over in training mode gives the very logits of eval mode without gradients, and stays as it was."""
    before = {name: value.clone() for name, value in SHARED.state_dict().items()}
    dumped(f"{HERE}:shared", tmp_path / "cache")
    reference = noisy_module().eval()
    with torch.no_grad():
        expected = torch.cat([reference(images.contiguous(memory_format=torch.channels_last)) for images in noise().split(8)])
        assert not torch.allclose(noisy_module()(noise()), expected, atol=0.1), "the modes do not differ: this proves nothing"
    assert torch.equal(answers(tmp_path / "cache"), expected.log_softmax(-1))
    assert SHARED.training
    assert all(torch.equal(value, before[name]) for name, value in SHARED.state_dict().items())
    assert all(parameter.grad is None for parameter in SHARED.parameters())


def test_a_teacher_that_leaves_eval_mode_is_refused(tmp_path: Path) -> None:
    """A module that puts itself into training mode is a TeacherError that names the part, and no block is written."""
    with pytest.raises(TeacherError, match=re.escape("puts itself into training mode (module dropout)")):
        dumped(f"{HERE}:restless", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_a_module_of_ones_own_is_known_by_its_weights(tmp_path: Path) -> None:
    """A `py:` teacher has the digest of its tensors: the recipe of the same network and weights from a file."""
    found = loaded(f"{HERE}:shared")
    assert found.sha256 == tensors_digest(network_state(SHARED))
    assert str(found.spec) == f"{HERE}:shared"
    torch.save(SHARED.state_dict(), tmp_path / "m.pt")
    assert loaded(tmp_path / "m.pt", f"{HERE}:shared").sha256 == found.sha256


def test_a_function_needs_a_version(tmp_path: Path) -> None:
    """A plain function has no weights to hash: it is refused without `version=`, which then tells it from others in the recipe."""
    with pytest.raises(SpecError, match=re.escape(f"--teacher {HERE}:brightness,scale=3.0,version=NAME")):
        loaded(f"{HERE}:brightness,scale=3.0")
    first = dumped(f"{HERE}:brightness,scale=3.0,version=one", tmp_path / "cache").manifest.recipe
    assert first.teacher.spec == f"{HERE}:brightness,scale=3.0,version=one"
    expected = brightness(3.0)(noise()).log_softmax(-1)
    assert torch.allclose(answers(tmp_path / "cache"), expected, atol=1e-6)
    assert loaded(f"{HERE}:brightness,scale=3.0,version=two").sha256 != first.teacher.sha256
    assert loaded(f"{HERE}:brightness,scale=3.0,version=one").sha256 == first.teacher.sha256


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (f"{HERE}:number,version=1", SpecError, "expected the function to return a torch.nn.Module or a callable, found int"),
        ("py:nowhere:build", SpecError, "No module named 'nowhere'"),
        ("torchvision:resnet18", CheckpointError, "would have random weights; expected --teacher torchvision:resnet18,weights=DEFAULT"),
        ("nowhere.safetensors", CheckpointError, "no model file at nowhere.safetensors"),
    ],
)
def test_what_is_no_teacher_is_refused(teacher: str, error: type[KdcacheError], message: str) -> None:
    """A spec that names no teacher, or one without weights, says what was expected."""
    with pytest.raises(error, match=re.escape(message)):
        loaded(teacher)


def test_a_spec_takes_no_architecture() -> None:
    """A teacher that is a spec is a whole network: an architecture beside it is refused."""
    with pytest.raises(SpecError, match=re.escape("says itself which network it is; expected no --arch for it, found small")):
        loaded(f"{HERE}:shared", "small")


def test_answers_that_are_no_tensor_are_refused(tmp_path: Path) -> None:
    """A function that gives a list instead of logits is named."""
    with pytest.raises(TeacherError, match=re.escape("expected the function to give logits as a torch.Tensor, found list")):
        dumped(f"{HERE}:returns_a_list,version=1", tmp_path / "cache")


@pytest.mark.parametrize("ensemble", ["logits", "probabilities"])
def test_an_average_is_what_it_says(ensemble: Ensemble, folder: Path, tmp_path: Path) -> None:
    """Stored labels are the mean of the members' logits, or the logarithm of the mean of their probabilities."""
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    result = dumped(files, tmp_path / "cache", ensemble=ensemble)
    with torch.no_grad():
        logits = [loaded(path).model(noise()).double() for path in files]
    probabilities = torch.stack(logits).softmax(-1).mean(0)
    expected = torch.stack(logits).mean(0).log_softmax(-1) if ensemble == "logits" else probabilities.log()
    assert torch.allclose(answers(tmp_path / "cache").double(), expected, atol=1e-4)
    record = result.manifest.recipe.teacher
    assert (record.spec, record.ensemble) == ("ensemble", ensemble)
    assert {member.sha256 for member in record.members} == {loaded(path).sha256 for path in files}
    assert [member.sha256 for member in record.members] == sorted(member.sha256 for member in record.members)


def test_the_order_of_members_does_not_matter(folder: Path, tmp_path: Path) -> None:
    """The same teachers in another order have the same recipe key and store the same bytes; another average or member has not."""
    a, b, mine = folder / "a.safetensors", folder / "b.safetensors", f"{HERE}:shared"
    one, two = dumped([a, b, mine], tmp_path / "one").manifest, dumped([mine, b, a], tmp_path / "two").manifest
    assert one.recipe_key == two.recipe_key
    assert torch.equal(answers(tmp_path / "one"), answers(tmp_path / "two"))
    others = [dumped([a, b, mine], tmp_path / "3", ensemble="probabilities"), dumped([a, b], tmp_path / "4"), dumped(a, tmp_path / "5")]
    assert len({one.recipe_key, *(other.manifest.recipe_key for other in others)}) == 4


def test_one_teacher_leaves_no_trace_of_averages(folder: Path, tmp_path: Path) -> None:
    """The record of a single teacher is what it was before there were several: also as a list of one, whatever the average."""
    alone = dumped(folder / "a.safetensors", tmp_path / "one").manifest
    listed = dumped([folder / "a.safetensors"], tmp_path / "two", ensemble="probabilities").manifest
    assert alone.recipe_key == listed.recipe_key
    assert set(to_json(alone.recipe.teacher)) == {"spec", "sha256", "num_classes", "precision", "positions"}


def test_members_must_fit_together(folder: Path, tmp_path: Path) -> None:
    """Teachers with other classes or shapes, the same one twice, none at all, or too many architectures are refused with what was found."""
    a = folder / "a.safetensors"
    with pytest.raises(
        TeacherError, match=r"must give logits of one shape, found py:.*with_positions,version=1: \[1, 4, 7\], tiny,.*: \[1, 7\]"
    ):
        dumped([a, f"{HERE}:with_positions,version=1"], tmp_path / "cache")
    spec = Spec.parse("tiny,channels=3,image_size=8,num_classes=4")
    save_model(tmp_path / "four.safetensors", build_model(spec, trusted=True), spec=spec, metadata={})
    with pytest.raises(MismatchError, match="tells 4 classes apart, the dataset has 7"):
        loaded([a, tmp_path / "four.safetensors"])
    with pytest.raises(ConfigError, match=re.escape(f"the same teacher is given twice: {TINY}")):
        loaded([a, a])
    with pytest.raises(ConfigError, match="expected a teacher, found none"):
        loaded([])
    with pytest.raises(ConfigError, match="one for all or 3, one for each --teacher in their order, found 2"):
        loaded([a, a, a], "tiny", "small")


def test_architectures_go_with_their_files(folder: Path, tmp_path: Path) -> None:
    """One architecture holds for all files, several for one each."""
    for name, arch in (("a", "tiny"), ("b", "tiny"), ("c", "small")):
        torch.manual_seed(ord(name))
        spec = Spec.parse(TINY.replace("tiny", arch))
        torch.save(network_state(build_model(spec, trusted=True)), tmp_path / f"{name}.pt")
    assert len(loaded([tmp_path / "a.pt", tmp_path / "b.pt"], "tiny").members) == 2
    found = loaded([tmp_path / "a.pt", tmp_path / "c.pt"], "tiny", "small")
    assert {member.spec.partition(",")[0] for member in found.members} == {"tiny", "small"}


def test_an_average_is_replayed_planned_and_agreed_with(folder: Path, tmp_path: Path) -> None:
    """A replay with the members in any order finds nothing, with one of them alone other weights; a plan names all in its command."""
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    root = dumped(files, tmp_path / "cache", ensemble="probabilities").path
    assert not replay(root, list(reversed(files)), num_records=16, data=DATA, device="cpu").problems
    assert any("other weights" in problem for problem in replay(root, files[0], num_records=16, data=DATA, device="cpu").problems)
    planned = plan(files, DATA, ensemble="probabilities", codecs=["topk,k=2"], samples=16, augment="none", device="cpu", kl=9)
    assert planned.command is not None
    assert f"--teacher {files[0]} --teacher {files[1]} " in planned.command
    assert "--ensemble probabilities" in planned.command
    agreement = evaluate(files[0], DATA, teacher=files, ensemble="probabilities", device="cpu").agreement
    assert agreement is not None
    assert 0 < agreement <= 1


@pytest.mark.slow
def test_teachers_on_the_command_line(folder: Path) -> None:
    """`--teacher` may be repeated, in files, specs, a configuration and the environment, and the summary names the same recipe each time."""
    here = Path(__file__).parent
    settings = ("--data", DATA, "--views", "1", "--augment", "none", "--codec", "dense", "--device", "cpu")
    (folder / "dump.toml").write_text('teacher = ["a.safetensors", "b.safetensors"]\nensemble = "probabilities"\n')
    flags = ("--teacher", "b.safetensors", "--teacher", "a.safetensors", "--ensemble", "probabilities")
    typed = kdcache_json("dump", *flags, *settings, "--out", "typed", cwd=folder, PYTHONPATH=_path(here))
    from_file = kdcache_json("dump", "--config", "dump.toml", *settings, "--out", "file", cwd=folder, PYTHONPATH=_path(here))
    lines = {"KDCACHE_DUMP_TEACHER": "a.safetensors\nb.safetensors", "KDCACHE_DUMP_ENSEMBLE": "probabilities"}
    from_lines = kdcache_json("dump", *settings, "--out", "lines", cwd=folder, PYTHONPATH=_path(here), **lines)
    assert typed["recipe_key"] == from_file["recipe_key"] == from_lines["recipe_key"]
    (folder / "one.toml").write_text('teacher = "a.safetensors"\n')
    kdcache("dump", "--config", "one.toml", *settings, "--out", "one", cwd=folder, PYTHONPATH=_path(here))
    assert "average of probabilities of 2 teachers" in kdcache("info", "typed", cwd=folder).stdout


def _path(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_mean_of_probabilities_is_finite_for_sure_teachers() -> None:
    """Members that are sure of different classes give finite log-probabilities in the mean of probabilities."""

    class Sure(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, images: Tensor) -> Tensor:
            return 1000 * F.one_hot(torch.full((len(images),), self.index), 3).float()

    found = EnsembleModel([Sure(0), Sure(1)], names=["a", "b"], ensemble="probabilities")(torch.zeros(2, *SHAPE))
    assert found.isfinite().all()
    assert torch.allclose(found[:, :2], torch.full((2, 2), -math.log(2)))
