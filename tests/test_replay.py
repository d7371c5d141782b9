"""`verify --replay`: stored labels are the teacher's answers to the views that students see, and what is not so is caught."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored
import torch
from commands import kdcache, kdcache_json
from kdcache.data import embedded_teacher
from safetensors.torch import load_file, save_file
from stored import LinearTeacher, dump_noise, signed
from torch import Tensor

from kdcache.learning.augmentations import PIPELINES
from kdcache.learning.checkpoints import save_model
from kdcache.learning.views import SeededViews
from kdcache.records.manifest import MANIFEST_NAME
from kdcache.records.specs import Spec
from kdcache.store.reader import CacheReader
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.replay import ReplayResult, distance, replay, spread
from kdcache.workflows.teaching import Teacher

NUM_CLASSES = 12
TOML_WITH_END = """
[[ops]]
op = "RandomCrop"
size = "input"
padding = 2

[[teacher]]
op = "Resize"
size = [12, 12]
antialias = true

[[teacher]]
op = "CenterCrop"
size = [8, 8]
"""


def replayed(folder: Path, *, num_records: int = 40, positions: tuple[int, ...] = ()) -> ReplayResult:
    """Replays the cache that `dump_noise` left in a folder."""
    name = f"{NUM_CLASSES}-{'-'.join(map(str, positions))}"
    spec = f"py:stored:LinearTeacher,num_classes={NUM_CLASSES},positions={positions}".replace(" ", "")
    data = f"py:stored:Noise,num_classes={NUM_CLASSES}"
    return replay(folder / "cache", folder / f"teacher-{name}.safetensors", arch=spec, data=data, num_records=num_records, device="cpu")


def require_right(result: ReplayResult) -> None:
    """Nothing differs, and the error is that of encoding but for a little noise."""
    assert result.problems == ()
    assert result.num_records == 40
    assert result.largest_error <= result.limit
    assert result.error == pytest.approx(result.encoding_error, rel=0.05, abs=4 * result.noise)


@pytest.mark.parametrize("augment", [*PIPELINES, "crop-flip,mixup=0.4", "crop-flip,cutmix=1.0,mixup=0.2,probability=0.7", "end.toml"])
@pytest.mark.parametrize("codec", ["dense,dtype=float32", "topk,k=4"])
def test_labels_are_those_of_the_replayed_views(augment: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every recipe, mixed ones and one with an end of the teacher's own: cached label = live teacher on the replayed view."""
    monkeypatch.chdir(tmp_path)
    Path("end.toml").write_text(TOML_WITH_END)
    dump_noise(tmp_path, codec=codec, num_classes=NUM_CLASSES, augment=augment)
    result = replayed(tmp_path)
    require_right(result)
    if codec.startswith("dense"):
        assert result.largest_error <= 4 * result.noise + 1e-6


@pytest.mark.parametrize("codec", ["adaptive,mean_k=4,max_k=8", "sampled,draws=20", "dense,dtype=uint8", "topk,k=4,values=float16"])
@pytest.mark.parametrize("positions", [(), (3,)])
def test_every_codec_is_replayed(codec: str, positions: tuple[int, ...], tmp_path: Path) -> None:
    """Ragged records, draws, coarse values and position axes are compared as well."""
    dump_noise(tmp_path, codec=codec, num_classes=NUM_CLASSES, positions=positions, augment="crop-flip")
    result = replayed(tmp_path, positions=positions)
    assert result.problems == ()
    assert result.largest_error <= result.limit < 0.5


def test_no_forward_pass_is_larger_than_the_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many records of one view are answered in batches of the dump's size, so that a replay takes no more memory than the dump did."""
    batch_size = dump_noise(tmp_path, codec="topk,k=4", num_classes=NUM_CLASSES).manifest.provenance.batch_size
    answer, sizes = Teacher.answer, []

    def counted(self: Teacher, decoded: Any, rows: Any, view: int) -> Any:
        sizes.append(len(rows))
        return answer(self, decoded, rows, view)

    monkeypatch.setattr(Teacher, "answer", counted)
    assert replayed(tmp_path, num_records=100).num_records == 100
    assert max(sizes) == batch_size < 20


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of cropped and flipped noise."""
    folder = tmp_path_factory.mktemp("cached")
    dump_noise(folder, codec="topk,k=4", num_classes=NUM_CLASSES, augment="crop-flip")
    return folder


def test_an_altered_pipeline_is_caught(cached: Path, tmp_path: Path) -> None:
    """Views that are made otherwise than the teacher's have other pixels and other answers."""
    dump_noise(tmp_path, codec="topk,k=4", num_classes=NUM_CLASSES, augment="crop-flip")
    path = tmp_path / "cache" / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    document["recipe"]["views"]["pipeline"][0]["padding"] = 3
    path.write_bytes(signed(document))
    pixels, labels = replayed(tmp_path).problems
    assert "has other pixels than the teacher saw" in pixels
    assert "of 40 records are not what the teacher gives for these views" in labels


def flipped_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every view of number 1 is mirrored."""
    make = SeededViews.__call__

    def mirrored(self: SeededViews, image: Tensor, key: bytes, view: int) -> Tensor:
        return make(self, image, key, view).flip(-1) if view == 1 else make(self, image, key, view)

    monkeypatch.setattr(SeededViews, "__call__", mirrored)


def shifted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record is read one row too far."""
    gather = CacheReader.gather
    monkeypatch.setattr(
        CacheReader, "gather", lambda self, names, rows, views: gather(self, names, (rows + 1) % self.manifest.grid.num_samples, views)
    )


@pytest.mark.parametrize(("spoil", "fewest"), [(flipped_views, 1), (shifted_rows, 38)])
def test_a_flipped_view_and_a_shifted_row_are_caught(
    spoil: Callable[[pytest.MonkeyPatch], None], fewest: int, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that belong to another view or sample are counted and the worst ones named."""
    require_right(replayed(cached))
    spoil(monkeypatch)
    result = replayed(cached)
    (labels,) = [problem for problem in result.problems if "stored labels" in problem]
    assert int(labels.removeprefix("the stored labels of ").partition(" ")[0]) >= fewest
    assert result.largest_error > 10 * result.limit
    assert "view " in labels
    assert "of row " in labels


def test_another_teacher_is_caught_by_its_weights_and_by_its_answers(cached: Path, tmp_path: Path) -> None:
    """A teacher with other weights is named by both digests, and its answers differ."""
    torch.manual_seed(3)
    spec = f"py:stored:LinearTeacher,num_classes={NUM_CLASSES},positions=()"
    save_model(tmp_path / "other.safetensors", LinearTeacher(NUM_CLASSES), spec=Spec.parse(spec), metadata={})
    data = f"py:{stored.__name__}:Noise,num_classes={NUM_CLASSES}"
    result = replay(cached / "cache", tmp_path / "other.safetensors", arch=spec, data=data, num_records=16, device="cpu")
    weights, labels = result.problems
    assert weights.startswith("the teacher has other weights than the cache's: sha256:")
    assert "of 16 records" in labels


def test_records_are_spread_over_samples_and_views() -> None:
    """As many records as asked for where there are so many, of a few views, the same ones every time."""
    chosen = list(spread(1000, range(8, 40), 64))
    assert chosen == list(spread(1000, range(8, 40), 64))
    assert len(chosen) == len({view for _, view in chosen}) == 8
    assert sum(len(rows) for rows, _ in chosen) == 64
    assert all(8 <= view < 40 and len(set(rows)) == len(rows) for rows, view in chosen)
    assert [len(rows) for rows, _ in spread(5, range(2), 100)] == [5, 5]
    assert [(len(rows), view) for rows, view in spread(50, range(1), 3)] == [(3, 0)]


def test_distance_is_zero_for_the_answers_themselves(
    teacher_logits: Callable[..., Tensor], keep_exactly: Callable[..., SoftTargets]
) -> None:
    """What is kept exactly is not far, however little; what is wrong by a factor is, by its spread."""
    logits = teacher_logits(50, 20).double()
    assert distance(SoftTargets.from_logits(logits), logits).max() < 1e-6
    assert distance(keep_exactly(logits, 3), logits).max() < 1e-3
    off = keep_exactly(logits, 3)
    off.log_probs[:, 1] += 0.1
    p = off.log_probs.softmax(-1)[:, 1]
    assert torch.allclose(distance(off, logits), 0.1 * (p * (1 - p)).sqrt(), rtol=0.2, atol=1e-3)


@pytest.mark.slow
def test_the_command_shows_the_error_beside_the_noise_and_exits_3_where_they_differ(tmp_path: Path) -> None:
    """The installed command, on the embedded teacher: right labels end in 0, another teacher in 3 with both digests."""
    data = "fashion-mini,split=test"
    kdcache("dump", "--teacher", embedded_teacher(), "--data", data, "--views", "2", "--out", "cache", cwd=tmp_path)
    shown = kdcache("verify", "cache", "--replay", "24", "--teacher", embedded_teacher(), cwd=tmp_path).stdout
    assert "24 records replayed: error " in shown
    assert "the teacher's own noise " in shown
    weights = load_file(embedded_teacher())
    changed = {name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(changed, tmp_path / "other.safetensors", metadata={"arch": "large,channels=1,image_size=28,num_classes=10"})
    shown = kdcache("verify", "cache", "--replay", "24", "--teacher", "other.safetensors", cwd=tmp_path, exits=3).stdout
    assert "the teacher has other weights than the cache's" in shown
    assert "are not what the teacher gives for these views" in shown
    replay_json = kdcache_json("verify", "cache", "--replay", "8", "--teacher", embedded_teacher(), cwd=tmp_path)["replay"]
    assert replay_json["problems"] == []
    assert replay_json["num_records"] == 8
    kdcache("verify", "cache", "--replay", "8", cwd=tmp_path, exits=2)
