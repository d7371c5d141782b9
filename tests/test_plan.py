"""`kdcache plan`: what it says of a codec is what a dump with it turns out to be."""

import itertools
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import kdcache as command
from commands import kdcache_json
from kdcache.data import embedded_teacher
from torch import Tensor

import kdcache
from kdcache.learning.fidelity import FullAnswers, completed_probs
from kdcache.learning.losses import TAILS
from kdcache.records.errors import ConfigError, SpecError
from kdcache.records.specs import Spec
from kdcache.targets.codecs import make_codec
from kdcache.targets.profile import Profile
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.plan import parse_bytes
from kdcache.workflows.tradeoff import candidate_codecs

NUM_SAMPLES, NUM_CLASSES = 1100, 100

MODULE = f"""
import torch


class Images:
    classes = range({NUM_CLASSES})

    def __len__(self):
        return {NUM_SAMPLES}

    def __getitem__(self, i):
        return torch.tensor([i % 256, i // 256], dtype=torch.uint8).view(1, 1, 2), i % {NUM_CLASSES}


class Teacher(torch.nn.Module):
    def __init__(self, positions=()):
        super().__init__()
        self.positions = tuple(positions)
        self.register_buffer("table", torch.zeros({NUM_SAMPLES}, {NUM_CLASSES}))

    def forward(self, x):
        pixels = (x * 255).round().long().flatten(1)
        logits = self.table[pixels[:, 0] + 256 * pixels[:, 1]]
        return logits.view(-1, *(1 for _ in self.positions), {NUM_CLASSES}).expand(-1, *self.positions, -1)
"""

ANSWERS = ("--teacher", "answers.pt", "--arch", "py:plan_answers:Teacher", "--data", "py:plan_answers:Images", "--augment", "none")
EMBEDDED = ("--teacher", embedded_teacher(), "--data", "fashion-mini,split=test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher whose answers are a table, and its dataset: samples of a class are answered much alike."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan_answers.py").write_text(MODULE)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(NUM_SAMPLES) % NUM_CLASSES
    alike = 2.5 * torch.randn(NUM_CLASSES, NUM_CLASSES, generator=generator) + 9 * torch.eye(NUM_CLASSES)
    torch.save({"table": alike[labels] + 0.7 * torch.randn(NUM_SAMPLES, NUM_CLASSES, generator=generator)}, folder / "answers.pt")
    return folder


@pytest.fixture
def planned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans for that teacher, from Python."""
    monkeypatch.syspath_prepend(folder)

    def plan(*, arch: str = "py:plan_answers:Teacher", **options: Any) -> kdcache.PlanResult:
        return kdcache.plan(folder / "answers.pt", "py:plan_answers:Images", arch=arch, augment="none", **options)

    return plan


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plan for the embedded teacher, as JSON."""
    return kdcache_json("plan", *EMBEDDED, "--samples", "200", cwd=tmp_path_factory.mktemp("embedded"))


def test_json_says_everything(embedded: Any) -> None:
    """The JSON holds what was asked, what was measured for each codec, what is recommended and what to run next."""
    assert {name: embedded[name] for name in ("num_samples", "num_views", "num_classes", "num_measured", "temperature", "kl_bound")} == {
        "num_samples": 2000, "num_views": 4, "num_classes": 10, "num_measured": 200, "temperature": 4.0, "kl_bound": 0.05,
    }  # fmt: skip
    assert embedded["teacher_accuracy"] > 0.85
    assert embedded["budget_bytes"] is None
    assert embedded["recommended"] in {codec["codec"] for codec in embedded["codecs"]}
    assert embedded["recommended"] in embedded["verdict"]
    assert f"--codec {embedded['recommended']}" in embedded["command"]
    assert {Spec.parse(codec["codec"]).name for codec in embedded["codecs"]} == {"topk", "adaptive", "sampled", "dense"}
    for codec in embedded["codecs"]:
        assert codec["record_bytes"] > 0
        assert codec["cache_bytes"] > 8000 * codec["record_bytes"]
        assert set(codec["retained_mass"]) == {"1", "2", "4"}
        assert codec["unbiased"] == (codec["kl"] is None) == codec["codec"].startswith("sampled")
        assert -1 <= codec["cosine"]["bucket"] <= 1.000001
        assert codec["hours"] == pytest.approx(8000 / codec["views_per_second"] / 3600)


def test_numbers_are_plausible(embedded: Any) -> None:
    """Dense loses nothing; more classes kept means more mass, less KL and a truer gradient; renormalising never helps."""
    codecs = {codec["codec"]: codec for codec in embedded["codecs"]}
    for dtype, most in (("uint8", 1e-4), ("float16", 1e-6), ("float32", 1e-10)):
        dense = codecs[f"dense,dtype={dtype}"]
        assert max(dense["kl"].values()) < most
        assert dense["retained_mass"] == pytest.approx({"1": 1, "2": 1, "4": 1})
        assert dense["cosine"] == {"bucket": pytest.approx(1, abs=1e-3)}
    topk = [codecs[f"topk,k={k}"] for k in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(topk):
        assert fewer["record_bytes"] < more["record_bytes"]
        for t in ("1", "2", "4"):
            assert fewer["retained_mass"][t] < more["retained_mass"][t]
            assert fewer["kl"][t] > more["kl"][t]
        assert fewer["cosine"]["bucket"] < more["cosine"]["bucket"]
    assert all(codec["cosine"]["renormalize"] < codec["cosine"]["bucket"] + 1e-6 for codec in topk)
    assert min(topk[-1]["cosine"], key=topk[-1]["cosine"].get) == "renormalize"


def test_the_command_it_prints_runs(folder: Path, tmp_path: Path) -> None:
    """The dump that a plan ends with runs as it stands, and its cache is as large as was said."""
    for name in ("plan_answers.py", "answers.pt"):
        (tmp_path / name).symlink_to(folder / name)
    arguments = ("--samples", "50", "--views", "3", "--codec", "topk,k=8,temperatures=(1,3)", "--kl", "100")
    plan = kdcache_json("plan", *ANSWERS, *arguments, cwd=tmp_path, PYTHONPATH=str(folder))
    assert plan["recommended"] == plan["best_within_budget"] == "topk,k=8,temperatures=(1,3)"
    program, *words = shlex.split(plan["command"])
    assert program == "kdcache"
    dumped = kdcache_json(*words, cwd=tmp_path, PYTHONPATH=str(folder))
    assert dumped["num_samples"] * dumped["num_views"] == plan["num_samples"] * plan["num_views"] == 3 * NUM_SAMPLES
    assert plan["codecs"][0]["cache_bytes"] == pytest.approx(dumped["size_bytes"], rel=0.05)


@pytest.mark.parametrize("codec", ["topk,k=8", "topk,k=1,profile=False", "dense,dtype=uint8", "adaptive,mean_k=6", "sampled,draws=9"])
def test_sizes_and_masses_are_those_of_the_cache(planned: Any, folder: Path, tmp_path: Path, codec: str) -> None:
    """A cache has the predicted bytes, entries and masses: to the byte where records have a fixed size, else nearly."""
    (found,) = planned(views=3, codecs=[codec], temperature=1).codecs
    dumped = kdcache.dump(
        folder / "answers.pt", "py:plan_answers:Images", tmp_path / "cache", arch="py:plan_answers:Teacher",
        augment="none", views=3, codec=codec,
    ).manifest  # fmt: skip
    metadata = sum(file.size_bytes for file in dumped.metadata_files if file.path.endswith("zarr.json"))
    assert found.cache_bytes == pytest.approx(dumped.size_bytes - metadata, rel=0.02)
    assert found.entries == pytest.approx(dumped.statistics.entries, rel=0.05)
    if not codec.startswith(("adaptive", "sampled")):
        assert found.cache_bytes == dumped.size_bytes - metadata
        files = [file for block in dumped.blocks for file in block.files]
        assert found.record_bytes * 3 * NUM_SAMPLES == sum(file.size_bytes - 4 for file in files)
    for temperature, mass in dumped.statistics.retained_mass.items():
        assert found.retained_mass[temperature] == pytest.approx(mass, abs=0.02)


def the_long_way(logits: list[float], soft: SoftTargets, row: int, temperature: float, profile: Tensor | None) -> float:
    """KL(full ‖ cached) of one record, class by class."""
    weights = [math.exp(logit / temperature) for logit in logits]
    p = [weight / sum(weights) for weight in weights]
    kept_probs, mass = soft.probs_at(temperature)
    assert soft.index is not None
    places = [place for place, is_kept in enumerate(soft.kept[row].tolist()) if is_kept]
    kept = {int(soft.index[row, place]): kept_probs[row, place].item() for place in places}
    rest = [c for c in range(len(logits)) if c not in kept]
    shape = [1.0 if profile is None else math.exp(profile[soft.top1[row], c].item() / temperature) for c in rest]
    total = sum(p[c] * (math.log(p[c]) - math.log(kept[c])) for c in kept)
    for c, share in zip(rest, shape, strict=True):
        total += p[c] * (math.log(p[c]) - math.log(mass[row].item() * share / sum(shape)))
    return total


@pytest.mark.parametrize("codec", ["topk,k=1", "topk,k=5", "topk,k=4,values=float16", "adaptive,mean_k=4,max_k=9"])
def test_divergence_is_that_of_the_long_way(teacher_logits: Any, codec: str) -> None:
    """KL(full ‖ cached) with either tail policy is the sum over classes that the definition says, at any temperature."""
    logits = teacher_logits(12, 30)
    made = make_codec(Spec.parse(codec), num_classes=30).calibrated(logits)
    table = teacher_logits(30, 30, seed=3).log_softmax(-1)
    decoded = made.decode(made.encode(logits))
    for temperature in (1.0, 2.0, 3.0):
        full = FullAnswers(logits, temperatures=[temperature], temperature=4.0)
        for tail, profile in (("uniform", None), ("profile", table)):
            soft = SoftTargets(**{**vars(decoded), "profile": None if profile is None else Profile(profile)})
            expected = [the_long_way(logits.double()[row].tolist(), soft, row, temperature, profile) for row in range(12)]
            assert full.divergence(soft, temperature, tail).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert completed_probs(soft, temperature, tail).sum(dim=-1).tolist() == pytest.approx([1.0] * 12)


def test_divergence_of_extreme_answers_is_finite() -> None:
    """A teacher that is certain, and one that cannot tell classes apart, have a finite KL with every codec."""
    certain = torch.zeros(2, 40).index_fill_(1, torch.tensor([3]), 2000.0)
    for logits in (certain, torch.zeros(2, 40), torch.full((2, 40), -3e4)):
        full = FullAnswers(logits, temperatures=[0.5, 4.0], temperature=4.0)
        for codec in ("topk,k=1", "topk,k=3", "adaptive,mean_k=2", "dense", "dense,dtype=uint8"):
            made = make_codec(Spec.parse(codec), num_classes=40).calibrated(logits)
            soft = made.decode(made.encode(logits))
            for temperature in (0.5, 4.0):
                kl = full.divergence(soft, temperature, "uniform")
                assert ((kl >= 0) & (kl < 0.05)).all(), (codec, kl)


def test_gradients_are_compared_as_their_formula_says(teacher_logits: Any) -> None:
    """The cosine is that between T (q - p) for the full answers and for the distribution that a tail policy completes."""
    logits = teacher_logits(20, 30)
    made = make_codec(Spec.parse("topk,k=4"), num_classes=30)
    soft = SoftTargets(**{**vars(made.decode(made.encode(logits))), "profile": Profile(teacher_logits(30, 30, seed=3))})
    full = FullAnswers(logits, temperatures=[2.0], temperature=2.0)
    p, q = (logits.double() / 2).softmax(-1), (logits.double() / 2 / 2).softmax(-1)
    is_kept = torch.zeros(20, 30).scatter(-1, soft.index, 1).bool()
    uniform = completed_probs(soft, 2.0, "uniform")
    targets = {
        "uniform": uniform,
        "profile": completed_probs(soft, 2.0, "profile"),
        "renormalize": torch.where(is_kept, uniform, 0) / torch.where(is_kept, uniform, 0).sum(-1, keepdim=True),
        "bucket": torch.where(is_kept, uniform, q * soft.tail_mass_at(2.0)[:, None] / torch.where(is_kept, 0, q).sum(-1, keepdim=True)),
    }
    assert set(targets) == set(TAILS)
    for tail, target in targets.items():
        expected = torch.nn.functional.cosine_similarity(q - target, q - p, dim=-1)
        assert full.gradient_cosine(soft, tail).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_no_record_is_measured_with_a_profile_that_knows_it(planned: Any) -> None:
    """Where every record has a top class of its own the profile says nothing of it; where many are alike it says much."""
    alone, alike = (planned(samples=samples, codecs=["topk,k=1"]).codecs[0] for samples in (NUM_CLASSES, NUM_SAMPLES))
    assert alike.kl_tail == {"1": "profile", "2": "profile", "4": "profile"}
    assert alike.kl["4"] < 0.8 * alone.kl["4"]


def test_bound_and_budget_decide(planned: Any) -> None:
    """A tighter bound asks for a larger codec; a budget that excludes it turns the advice to the best that fits."""
    look = {"samples": 128, "codecs": [*(f"topk,k={k}" for k in (2, 8, 32, 96)), "dense,dtype=uint8", "dense"]}
    loose, tight = planned(kl=0.2, **look), planned(kl=1e-3, **look)
    size = {codec.codec: codec.cache_bytes for codec in tight.codecs}
    kl = {codec.codec: codec.kl_at(4.0) for codec in tight.codecs}
    assert size[loose.recommended] < size[tight.recommended]
    assert kl[tight.recommended] <= 1e-3 < kl[loose.recommended] <= 0.2
    budget = size[tight.recommended] - 1
    short = planned(kl=1e-3, budget=budget, **look)
    assert short.recommended is None
    assert kl[short.best_within_budget] == min(value for name, value in kl.items() if size[name] <= budget)
    assert f"--codec {short.best_within_budget}" in short.command
    assert f"{tight.recommended} takes {budget + 1:,}" in short.verdict
    assert planned(kl=0.2, budget=budget, **look).recommended == loose.recommended


def test_a_budget_that_nothing_fits_into(planned: Any) -> None:
    """It is said, with the smallest codec, and there is no command to run."""
    result = planned(samples=16, budget="1KB")
    assert "no codec fits into --budget 1,000 bytes: the smallest, topk,k=1, takes" in result.verdict
    assert (result.recommended, result.best_within_budget, result.command, result.chosen) == (None, None, None, None)


def test_only_codecs_that_draw(planned: Any) -> None:
    """Codecs without a KL are measured by their gradients, and none is recommended."""
    result = planned(samples=64, codecs=["sampled,draws=5,temperature=4", "sampled,draws=80,temperature=4"])
    few, many = result.codecs
    assert few.cosine["bucket"] < many.cosine["bucket"]
    assert (result.recommended, result.command, few.kl) == (None, None, None)
    assert "cosines" in result.verdict


def test_an_undeclared_temperature_is_declared(planned: Any) -> None:
    """For students at a temperature that codecs do not store the tail of by default, the specs declare it."""
    result = planned(samples=16, temperature=3)
    assert set(result.codecs[0].retained_mass) == {"1", "2", "3", "4"}
    assert all("temperatures=(1,2,3,4)" in codec.codec for codec in result.codecs if codec.family in ("topk", "adaptive"))


@pytest.mark.parametrize("num_classes", [1, 2, 3, 10, 1000, 40_000])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_candidates_exist(num_classes: int, temperature: float) -> None:
    """Whatever the number of classes, all candidates are codecs, and all of a family are different ones."""
    specs = [str(make_codec(spec, num_classes=num_classes).spec) for spec in candidate_codecs(num_classes, temperature)]
    assert len(specs) == len(set(specs)) >= 3


def test_outputs_with_positions(planned: Any) -> None:
    """A teacher with position axes is planned for as well: each of the five positions takes as many entries."""
    plain = planned(samples=64, codecs=["topk,k=4", "adaptive,mean_k=4"])
    five = planned(samples=64, codecs=["topk,k=4", "adaptive,mean_k=4"], arch="py:plan_answers:Teacher,positions=(5,)")
    assert five.teacher_accuracy is None
    for one, many in zip(plain.codecs, five.codecs, strict=True):
        assert many.entries == pytest.approx(one.entries)
        assert 4 * one.record_bytes < many.record_bytes < 5.2 * one.record_bytes
        assert many.kl["2"] == pytest.approx(one.kl["2"], rel=0.3)


def test_samples_are_at_most_those_there_are(planned: Any) -> None:
    """More samples than the dataset has means all of them; one alone is enough to plan."""
    assert planned(samples=10**6, codecs=["dense"]).num_measured == NUM_SAMPLES
    assert planned(samples=1, codecs=["topk,k=2"]).num_measured == 1


def test_page_and_figures(planned: Any, tmp_path: Path) -> None:
    """The page holds curve and table and fetches nothing; .svg and .png hold the curve; without --out no file is written."""
    page, png, svg = tmp_path / "plan.html", tmp_path / "new" / "plan.png", tmp_path / "plan.svg"
    result = planned(samples=64, out=page, budget="1MB")
    text = page.read_text("utf-8")
    assert text.count("<svg") == 1
    assert not re.findall(r"""(?:src|href)=["'](?!#)|<script|<link|@import|url\((?!#)""", text)
    for words in (*(codec.codec for codec in result.codecs), "budget, 1,000,000 bytes", "bound, 0.05 nat", "kdcache dump --teacher"):
        assert words in text
    planned(samples=16, codecs=["topk,k=2", "dense"], out=png)
    planned(samples=16, codecs=["topk,k=2", "sampled,draws=9,temperature=4"], out=svg, kl=1e-9)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "plan.html", "plan.svg"]


def test_text_shows_the_table_and_what_to_run(folder: Path, tmp_path: Path) -> None:
    """On stdout: a row a codec with the recommended one marked, the records, the time, the verdict, the next command."""
    arguments = ("plan", *ANSWERS[2:], "--teacher", folder / "answers.pt", "--codec", "topk,k=4", "--codec", "dense", "--kl", "1e-5")
    done = command(*arguments, cwd=tmp_path, PYTHONPATH=str(folder))
    assert "→ dense" in done.stdout
    assert "1,100 samples × 4 views = 4,400" in done.stdout
    assert re.search(r"^time .* views/s on this machine$", done.stdout, re.MULTILINE)
    assert re.search(r"^next +kdcache dump .*--codec dense ", done.stdout, re.MULTILINE)
    assert "512 records make a poor profile of 100 classes" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--samples", "0"), "'--samples'"), (("--budget", "3 parsecs"), "expected --budget to be a positive size")],
)
def test_bad_input_exits_2(tmp_path: Path, arguments: tuple[str, str], words: str) -> None:
    """A value that makes no sense is refused by the name of its option."""
    done = command("plan", *EMBEDDED, *arguments, cwd=tmp_path, exits=2)
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "--samples to be at least 1"),
        ({"views": -1}, "--views to be at least 1"),
        ({"kl": 0.0}, "--kl to be a positive number"),
        ({"kl": math.inf}, "--kl to be a positive number"),
        ({"temperature": -4.0}, "--temperature to be a positive number"),
        ({"temperature": math.nan}, "--temperature to be a positive number, found nan"),
        ({"codecs": ["sampled"]}, "--codec sampled draws at temperature 1"),
        ({"budget": 0}, "--budget to be a positive size"),
        ({"out": Path()}, "--out to be a file"),
        ({"out": Path("plan.pdf")}, "--out to be a file that ends in .html, .svg, .png, found plan.pdf"),
    ],
)
def test_bad_numbers_from_python(planned: Any, options: dict[str, Any], words: str) -> None:
    """Numbers out of range, codecs that do not fit and files of no known kind are refused before the teacher answers."""
    with pytest.raises(ConfigError, match=words):
        planned(**options)


def test_bad_codec(planned: Any) -> None:
    """A codec that the classes do not allow is refused as dump refuses it."""
    with pytest.raises(SpecError, match="expected k from 1 to 100"):
        planned(codecs=["topk,k=101"])


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 * 2**30), ("1.5 kb", 1500), ("12345", 12345), (7, 7), ("0.3TiB", 329853488332)],
)
def test_sizes(text: str | int, size: int) -> None:
    """Sizes are decimal or binary, with or without a unit."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "0.4B", "1 light year", "1e9", "nan", "9" * 400 + "XB", "1GB2"])
def test_what_is_no_size(text: str) -> None:
    """Anything else is refused with what was found."""
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse_bytes(text)


def test_help_has_two_examples(tmp_path: Path) -> None:
    """The help ends with two examples and knows --json."""
    shown = command("plan", "--help", cwd=tmp_path).stdout
    assert len(re.findall(r"^ +kdcache plan\b", shown[shown.index("Examples:") :], re.MULTILINE)) == 2
    assert "--json" in shown
