"""Views: the same pixels in any process, order and batch, and pipelines that are data and nothing else."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from replaying import SHAPE, Item, ViewsOf, another_process, as_list, views_by_name
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from kdcache.learning.augmentations import PIPELINES
from kdcache.learning.datasets import Dataset, open_dataset, wrap_dataset
from kdcache.learning.loader import ViewLoader
from kdcache.learning.samples import ViewedSamples
from kdcache.learning.schedule import ViewSchedule
from kdcache.learning.views import SeededViews, library_versions, make_views
from kdcache.records.errors import ConfigError, MismatchError, SpecError
from kdcache.records.manifest import ViewsRecord
from kdcache.records.specs import Spec
from kdcache.targets.soft_targets import SoftTargets

NUM_SAMPLES = 70
Pixels = dict[tuple[int, int], bytes]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """A few samples of the embedded set."""
    whole = open_dataset(Spec.parse("fashion-mini,split=test"), trusted=True)
    return wrap_dataset(Subset(whole.source, range(NUM_SAMPLES)), num_classes=10)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def image() -> Tensor:
    """A colour image in which every pixel is another one."""
    return torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def views_of(pipeline: str, *, seed: int = 0, shape: tuple[int, int, int] = (1, 28, 28)) -> SeededViews:
    """The views of a pipeline that is known by name."""
    return make_views(pipeline, seed=seed, image_shape=shape)


def row_and_view(rows: NDArray[np.int64], views: NDArray[np.int64]) -> SoftTargets:
    """In place of a teacher's answers: which (row, view) a record is."""
    pairs = torch.stack([torch.from_numpy(rows), torch.from_numpy(views)], -1).float()
    return SoftTargets(log_probs=pairs, index=None, tail_mass=None, temperatures=(), num_classes=2)


def pixels_of(loader: ViewLoader, epoch: int) -> tuple[Pixels, list[int]]:
    """Pixels by (row, view), and the order of the rows, of one epoch."""
    pixels: Pixels = {}
    order = []
    for batch in loader.epoch(epoch):
        assert batch.soft is not None
        for image, (row, view) in zip(batch.images, batch.soft.log_probs.long().tolist(), strict=True):
            pixels[row, view] = (image * 255).round().to(torch.uint8).numpy().tobytes()
            order.append(row)
    return pixels, order


@pytest.fixture(scope="module")
def expected(dataset: Dataset) -> Pixels:
    """Pixels by (row, view), made one by one."""
    views = views_of("rrc-flip")
    keys = [key.tobytes() for key in dataset.keys]
    return {(row, view): views(dataset[row][0], keys[row], view).numpy().tobytes() for row in range(NUM_SAMPLES) for view in (0, 1)}


@pytest.mark.parametrize(
    ("num_workers", "batch_size", "seed"), [(0, 1, 0), (0, 7, 0), (0, 64, 0), (0, 7, 1), (1, 7, 0), (2, 7, 0), (2, 64, 1)]
)
def test_pixels_depend_on_sample_and_view_only(num_workers: int, batch_size: int, seed: int, dataset: Dataset, expected: Pixels) -> None:
    """Whatever the workers, the batch size and the order, a (sample, view) has the pixels that it has when made alone."""
    loader = ViewLoader(
        ViewedSamples(dataset, views_of("rrc-flip")),
        batch_size=batch_size,
        seed=seed,
        schedule=ViewSchedule(views=range(2)),
        gather=row_and_view,
        num_workers=num_workers,
    )
    assert len(loader) == -(-NUM_SAMPLES // batch_size)
    (first, order), (second, other_order), (third, _) = (pixels_of(loader, epoch) for epoch in range(3))
    assert first | second == expected
    assert third == first
    assert sorted(order) == sorted(other_order) == list(range(NUM_SAMPLES))
    assert order != other_order


def test_order_is_keyed_by_seed_and_epoch(dataset: Dataset) -> None:
    """The order of an epoch follows from its seed and number alone: the same ones again, other ones for another seed or epoch."""
    loaders = [
        ViewLoader(ViewedSamples(dataset, views_of("none")), batch_size=size, seed=seed, gather=row_and_view)
        for size, seed in [(7, 0), (32, 0), (7, 1)]
    ]
    orders = [pixels_of(loader, epoch)[1] for loader, epoch in [(loaders[0], 3), (loaders[1], 3), (loaders[2], 3), (loaders[0], 4)]]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_without_a_number_of_views_every_epoch_is_fresh(dataset: Dataset) -> None:
    """Plain supervised training sees view e in epoch e."""
    loader = ViewLoader(ViewedSamples(dataset, views_of("none")), batch_size=64, gather=row_and_view)
    assert {view for _, view in pixels_of(loader, 5)[0]} == {5}


def test_labels_stay_with_their_images(dataset: Dataset) -> None:
    """A batch's labels are those of its rows."""
    for batch in ViewLoader(ViewedSamples(dataset, views_of("none")), batch_size=32, gather=row_and_view).epoch(0):
        assert batch.soft is not None
        rows = batch.soft.log_probs[:, 0].long()
        assert torch.equal(batch.labels, torch.from_numpy(dataset.labels)[rows])
        assert batch.images.min() >= 0
        assert batch.images.max() == 1


def test_last_batch_is_dropped_when_asked_and_never_the_only_one(dataset: Dataset) -> None:
    """With drop_last every batch is full; a set smaller than one batch still gives that batch."""
    full = ViewLoader(ViewedSamples(dataset, views_of("none")), batch_size=32, drop_last=True)
    assert [len(batch.labels) for batch in full.epoch(0)] == [32, 32]
    assert len(full) == 2
    only = ViewLoader(ViewedSamples(dataset, views_of("none")), batch_size=100, drop_last=True)
    assert [len(batch.labels) for batch in only.epoch(0)] == [NUM_SAMPLES]


def test_epochs_that_are_read_side_by_side_do_not_mix(dataset: Dataset) -> None:
    """An epoch shows its own view to the end, also while another one is being read."""
    loader = ViewLoader(ViewedSamples(dataset, views_of("none")), batch_size=32, gather=row_and_view)
    shown = [
        [soft.log_probs[:, 1].unique().tolist() for soft in (first.soft, second.soft) if soft is not None]
        for first, second in zip(loader.epoch(0), loader.epoch(1), strict=True)
    ]
    assert shown == [[[0], [1]]] * 3


def test_images_of_different_sizes_are_refused() -> None:
    """Images of two sizes in one batch are a MismatchError that shows both and says what mends it."""
    images = [(torch.zeros(1, size, 8, dtype=torch.uint8), 0) for size in (8, 9)]
    loader = ViewLoader(ViewedSamples(wrap_dataset(images), views_of("none")), batch_size=2)
    with pytest.raises(MismatchError, match="different sizes in one batch") as caught:
        next(loader.epoch(0))
    assert "[1, 8, 8]" in str(caught.value)
    assert "[1, 9, 8]" in str(caught.value)
    assert "size=224" in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "num_workers", "found"), [(0, 0, "both at least 1, found 0"), (-1, 0, "both at least 1, found -1"), (1, -1, "found -1")]
)
def test_impossible_sizes_are_refused(batch_size: int, num_workers: int, found: str, dataset: Dataset) -> None:
    """A batch of nothing, or fewer than no workers, is a ConfigError that shows what was given."""
    with pytest.raises(ConfigError, match=found):
        ViewLoader(ViewedSamples(dataset, views_of("none")), batch_size=batch_size, num_workers=num_workers)


KINDS: list[tuple[str | None, int, int, int]] = [
    (None, 0, 1, 0), (None, 0, 7, 1), (None, 0, 64, 1), ("fork", 1, 1, 1), ("fork", 1, 64, 0), ("fork", 2, 7, 0), ("fork", 2, 64, 1),
    ("spawn", 1, 7, 1), ("spawn", 2, 64, 0),
]  # fmt: skip
"""How processes start, how many, the batch size, and the seed of the order."""


@pytest.fixture(scope="module")
def recipes() -> list[SeededViews]:
    """Every named augmentation: the part that teacher and students share; crop-flip also with all of its views."""
    every = [views_of(name, seed=5, shape=SHAPE) for name in PIPELINES]
    return [*every, make_views("crop-flip", seed=5, image_shape=SHAPE, enumerated=True)]


@pytest.fixture(scope="module")
def made_here(recipes: list[SeededViews]) -> dict[Item, bytes]:
    """Pixels by (recipe, image, view), made one by one."""
    return dict(ViewsOf(recipes, [(recipe, image, view) for recipe in range(len(recipes)) for image in range(4) for view in range(6)]))


@pytest.mark.parametrize(("start", "num_workers", "batch_size", "seed"), KINDS)
def test_every_recipe_is_repeated_to_the_bit(
    start: str | None, num_workers: int, batch_size: int, seed: int, recipes: list[SeededViews], made_here: dict[Item, bytes]
) -> None:
    """Each named augmentation makes the same pixels with 0, 1, 2 workers, forked or spawned, in batches of any size, in any order."""
    items = sorted(made_here)
    random.Random(seed).shuffle(items)
    loader = DataLoader(
        ViewsOf(recipes, items), batch_size=batch_size, num_workers=num_workers, multiprocessing_context=start, collate_fn=as_list
    )
    seen = [item for batch in loader for item in batch]
    assert [item for item, _ in seen] == items
    assert dict(seen) == made_here


def test_another_process_makes_the_same_pixels(made_here: dict[Item, bytes]) -> None:
    """A fresh process with another thread count and random state, which reads the names anew, makes the very same views."""
    with another_process() as process:
        assert process.apply(views_by_name, (PIPELINES, 5)) == {
            item: pixels for item, pixels in made_here.items() if item[0] < len(PIPELINES)
        }


@pytest.mark.parametrize(("pipeline", "expected"), [("crop-flip", 28), ("rrc-flip", 35), ("randaug", 35), ("timm-a3", 35)])
def test_views_seeds_and_samples_differ(pipeline: str, expected: int, image: Tensor) -> None:
    """Another view, seed or key gives other pixels; chance alone lets a few of 36 among the 162 views of crop-flip be equal."""
    every = [views_of(pipeline, seed=seed, shape=(3, 20, 24)) for seed in range(3)]
    made = [
        views(image, bytes([key]) * 16, view).contiguous().numpy().tobytes() for views in every for key in range(3) for view in range(4)
    ]
    assert len(made) == 36
    assert len(set(made)) >= expected
    assert all(len(pixels) == image.numel() for pixels in made)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_callers_random_state_is_untouched_and_unread(pipeline: str, image: Tensor) -> None:
    """Making a view neither changes the caller's random state nor depends on it."""
    views = views_of(pipeline, shape=(3, 20, 24))
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(views(image, b"k" * 16, 3))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*made)


def test_random_state_survives_an_operation_that_fails(image: Tensor) -> None:
    """An operation that raises in the middle of a view leaves the caller's random state as it was."""
    pipeline = ({"op": "RandomCrop", "size": [8, 8]}, {"op": "RandomCrop", "size": [16, 16]})
    views = SeededViews(ViewsRecord(pipeline=pipeline, seed=0, versions={}))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="larger than"):
        views(image, b"k" * 16, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_an_epoch_leaves_the_callers_random_state(dataset: Dataset) -> None:
    """Reading batches draws nothing from the caller's random stream."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(ViewLoader(ViewedSamples(dataset, views_of("crop-flip")), batch_size=32).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_augmentation_is_the_image_itself(image: Tensor) -> None:
    """The pipeline `none` gives the image as it is, for every view."""
    assert torch.equal(views_of("none", shape=(3, 20, 24))(image, b"k" * 16, 7), image)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 24)])
def test_size_input_is_the_images_own_size(shape: tuple[int, int, int]) -> None:
    """`size = "input"` becomes height and width of the dataset's images, so a manifest says the numbers."""
    for name in ("crop-flip", "rrc-flip"):
        pipeline = views_of(name, shape=shape).record.pipeline
        assert pipeline[0]["size"] == list(shape[1:])
        assert "input" not in str(pipeline)
        image = torch.zeros(shape, dtype=torch.uint8)
        assert SeededViews(ViewsRecord(pipeline=pipeline, seed=0, versions={}))(image, b"k" * 16, 0).shape == shape


def test_named_pipelines_are_what_their_files_say() -> None:
    """The pipeline of the README: pad by four, crop back, flip half of the time."""
    assert views_of("none").record.pipeline == ()
    assert views_of("crop-flip").record.pipeline == (
        {"op": "RandomCrop", "size": [28, 28], "padding": 4},
        {"op": "RandomHorizontalFlip", "p": 0.5},
    )


def test_a_file_of_ones_own(tmp_path: Path, image: Tensor) -> None:
    """A TOML file with [[ops]] tables is a pipeline: operations in order, with interpolation by name."""
    file = tmp_path / "mine.toml"
    file.write_text(
        """
        [[ops]]
        op = "Resize"
        size = [10, 12]
        interpolation = "bicubic"
        [[ops]]
        op = "RandomVerticalFlip"
        p = 1.0
        [[ops]]
        op = "Resize"
        size = "input"
        interpolation = "nearest"
        """
    )
    views = make_views(str(file), seed=0, image_shape=(3, 20, 24))
    assert views.record.pipeline == (
        {"op": "Resize", "size": [10, 12], "interpolation": "bicubic"},
        {"op": "RandomVerticalFlip", "p": 1.0},
        {"op": "Resize", "size": [20, 24], "interpolation": "nearest"},
    )
    assert views.record.versions == library_versions()
    made = views(image, b"k" * 16, 0)
    assert made.shape == image.shape
    assert torch.equal(made[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2), made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[ops]\n", "is not valid TOML"),
        ("", "expected [[ops]] tables, each with op = NAME, and at most [[teacher]] tables and a [mix] table beside them, found the keys []"),
        ("ops = 3", "expected [[ops]] tables"),
        ("ops = ['RandomCrop']", "expected [[ops]] tables"),
        ("[ops]\nop = 'RandomCrop'", "expected [[ops]] tables"),
        ("seed = 3\nops = []", "found the keys ['ops', 'seed']"),
        ("ops = [{p = 0.5}]", "unknown operation None"),
        ("ops = [{op = 3}]", "unknown operation 3"),
        ("ops = [{op = 'RandomFlip'}]", "unknown operation 'RandomFlip'"),
        ("ops = [{op = 'Transform'}]", "unknown operation 'Transform'"),
        ("ops = [{op = 'functional'}]", "unknown operation 'functional'"),
        ("ops = [{op = 'InterpolationMode', value = 'x'}]", "unknown operation 'InterpolationMode'"),
        ("ops = [{op = 'query_size', value = 'x'}]", "unknown operation 'query_size'"),
        ("ops = [{op = '__builtins__'}]", "unknown operation '__builtins__'"),
        ("ops = [{op = 'functional.resize', size = 3}]", "unknown operation 'functional.resize'"),
        ("ops = [{op = 'RandomCrop', size = 'input', seed = 3}]", "unexpected keyword argument 'seed'"),
        ("ops = [{op = 'RandomCrop'}]", "missing 1 required positional argument: 'size'"),
        ("ops = [{op = 'GaussianBlur', kernel_size = 2}]", "odd and positive"),
        ("ops = [{op = 'Resize', size = [8, 8], interpolation = 'cubic'}]", "unknown interpolation 'cubic'"),
        ("ops = [{op = 'LinearTransformation', transformation_matrix = [1], mean_vector = [1]}]", "LinearTransformation"),
    ],
)  # fmt: skip
def test_what_is_no_pipeline_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """A file that is no list of torchvision operations with their arguments is a SpecError that says what is wrong."""
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(SpecError, match=re.escape(message)):
        views_of(str(file), shape=SHAPE)


@pytest.mark.parametrize(
    "operation",
    [
        "{op = 'Lambda', lambd = 'print'}",
        "{op = 'RandomApply', transforms = ['RandomCrop']}",
        "{op = 'RandomChoice', transforms = ['RandomCrop']}",
        "{op = 'MixUp', num_classes = 10}",
        "{op = 'CutMix', num_classes = 10}",
        "{op = 'TenCrop', size = 8}",
        "{op = 'ToPILImage'}",
        "{op = 'Resize', size = 'small'}",
        "{op = 'Normalize', mean = [0.5], std = [0.5]}",
        "{op = 'ConvertImageDtype'}",
        "{op = 'RandomCrop', size = [99, 99]}",
    ],
)
def test_operations_that_make_no_image_are_refused(operation: str, tmp_path: Path) -> None:
    """An operation that does not turn one uint8 image into another is refused when the pipeline is read, not in the middle of a dump."""
    file = tmp_path / "mine.toml"
    file.write_text(f"ops = [{operation}]")
    with pytest.raises(SpecError):
        views_of(str(file), shape=SHAPE)


@pytest.mark.parametrize("augment", ["crop_flip", "missing.toml", "/etc/hostname", "crop-flip.toml,size=3"])
def test_what_is_neither_name_nor_file_is_refused(augment: str) -> None:
    """An unknown name is a SpecError that lists the known ones."""
    with pytest.raises(SpecError, match=r"expected one of: none, crop-flip, rrc-flip, randaug, timm-a3, an existing \.toml file"):
        views_of(augment)


def test_versions_leave_out_the_build() -> None:
    """The versions that decide about pixels are releases: a CPU and a CUDA build of one release are the same."""
    versions = library_versions()
    assert versions.keys() == {"torch", "torchvision"}
    assert all("+" not in version for version in versions.values())
    assert torch.__version__.startswith(versions["torch"])
