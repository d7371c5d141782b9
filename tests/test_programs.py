"""Exported networks as teachers: `.pt2` and `.onnx` give the network's own answers, and nothing in them is ever executed."""

import contextlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import kdcache, kdcache_json
from test_models import Hostile
from torch import Tensor, nn

from kdcache.learning.checkpoints import LoadedModel, save_model
from kdcache.learning.models import build_model
from kdcache.learning.teachers import load_teacher
from kdcache.records.errors import CheckpointError, ConfigError, MismatchError, SpecError
from kdcache.records.hashing import sha256_file
from kdcache.records.specs import Spec
from kdcache.workflows.dump import dump

onnx = pytest.importorskip("onnx", reason="pip install 'kdcache[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'kdcache[onnx]'")
NUM_CLASSES = 10
SHAPE = (1, 28, 28)
Document = dict[str, Any]


def network(channels: int = 1) -> nn.Module:
    """A small network with batch norm, dropout and attention-like views, in eval mode; always the same weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(24, NUM_CLASSES))
    model(torch.rand(8, channels, 28, 28))
    return model.eval()


def export(model: nn.Module, path: Path, *, batch: int = 2, dynamic: bool = True, channels: int = 1) -> Path:
    """Writes a `.pt2` for images of 28 by 28."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    torch.export.save(torch.export.export(model, (torch.rand(batch, channels, 28, 28),), dynamic_shapes=shapes), path)
    return path


def write_onnx(path: Path, *, batch: int | str = "batch", training: bool = False, domain: str = "", outside: bool = False) -> Path:
    """Writes the same network as an `.onnx`, layer by layer."""
    layers = network()
    state = {name.replace(".", "_"): value.numpy() for name, value in layers.state_dict().items() if value.ndim}
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["images", "0_weight", "0_bias"], ["a"], strides=[2, 2], kernel_shape=[3, 3]),
        make("BatchNormalization", ["a", "1_weight", "1_bias", "1_running_mean", "1_running_var"], ["b"], training_mode=int(training)),
        make("Relu", ["b"], ["c"], domain=domain),
        make("AveragePool", ["c"], ["d"], kernel_shape=[7, 7], strides=[6, 6]),  # 13 pixels into two windows
        make("Flatten", ["d"], ["e"]),
        make("Gemm", ["e", "6_weight", "6_bias"], ["logits"], transB=1),
    ]
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "network",
        [onnx.helper.make_tensor_value_info("images", floats, [batch, *SHAPE])],
        [onnx.helper.make_tensor_value_info("logits", floats, [batch, NUM_CLASSES])],
        [onnx.numpy_helper.from_array(value, name) for name, value in state.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 17), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, path, save_as_external_data=outside, location=f"{path.name}.data", size_threshold=0)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network in every form: dynamic.pt2, static.pt2 (batches of 4), dynamic.onnx, static.onnx (batches of 4), outside.onnx."""
    folder = tmp_path_factory.mktemp("programs")
    export(network(), folder / "dynamic.pt2")
    export(network(), folder / "static.pt2", batch=4, dynamic=False)
    write_onnx(folder / "dynamic.onnx")
    write_onnx(folder / "static.onnx", batch=4)
    write_onnx(folder / "outside.onnx", outside=True)
    return folder


FILES = ["dynamic.pt2", "static.pt2", "dynamic.onnx", "static.onnx", "outside.onnx"]


def loaded(path: Path, arch: str | None = None, *, num_classes: int = NUM_CLASSES, shape: tuple[int, ...] = SHAPE) -> LoadedModel:
    """An exported network for grey images of 28 by 28."""
    return load_teacher(path, num_classes=num_classes, image_shape=shape, arch=None if arch is None else Spec.parse(arch))


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """As a dump asks: in eval mode, with channels last."""
    with torch.inference_mode():
        found: Tensor = model.eval().to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_an_exported_network_gives_its_own_answers(name: str, batch: int, folder: Path) -> None:
    """Logits are those of the module that was exported, at any batch size: fixed ones are padded, and padding is left out."""
    images = torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))
    reference = network()
    if name.endswith("onnx"):
        reference[4] = nn.AvgPool2d(7, 6)  # as written above
    expected = answers(reference, images)
    assert torch.allclose(answers(loaded(folder / name).model, images), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_normalisation_is_none_unless_asked_for(kind: str, folder: Path) -> None:
    """The graph gets images in [0, 1] as they are; with `norm` the input end normalises them first. The spec says which."""
    images = torch.rand(3, *SHAPE)
    plain, half = loaded(folder / f"dynamic.{kind}"), loaded(folder / f"dynamic.{kind}", f"{kind},norm=half")
    assert (str(plain.spec), str(half.spec)) == (f"{kind},channels=1,norm=none", f"{kind},channels=1,norm=half")
    assert torch.allclose(answers(half.model, images), answers(plain.model, (images - 0.5) / 0.25), atol=1e-5)
    assert not torch.allclose(answers(half.model, images), answers(plain.model, images), atol=1e-2)


def test_grey_images_feed_a_colour_program(tmp_path: Path) -> None:
    """A program for colour images takes grey ones as any other network does."""
    path = export(network(3), tmp_path / "colour.pt2", channels=3)
    images = torch.rand(3, *SHAPE)
    assert torch.allclose(answers(loaded(path).model, images), answers(network(3), images.expand(-1, 3, -1, -1)), atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic.pt2", "dynamic.onnx"])
def test_what_does_not_fit_is_refused(name: str, folder: Path) -> None:
    """Other classes, channels, sizes, or another architecture, say what was expected and what was found."""
    path, kind = folder / name, name.partition(".")[2]
    with pytest.raises(MismatchError, match="tells 10 classes apart, the dataset has 4"):
        loaded(path, num_classes=4)
    with pytest.raises(MismatchError, match="takes images of 1 channels, the dataset has 3"):
        loaded(path, shape=(3, 28, 28))
    with pytest.raises(MismatchError, match="takes images of 1 channels, --arch says 3"):
        loaded(path, f"{kind},channels=3")
    with pytest.raises(MismatchError, match=re.escape("= [1, 28, 28], the views are [1, 32, 32]. Such as --augment rrc-flip,size=28")):
        answers(loaded(path).model, torch.rand(2, 1, 32, 32))
    with pytest.raises(SpecError, match=re.escape(f"brings its own network; expected --arch {kind}[,norm=none|half|imagenet]")):
        loaded(path, "torchvision:resnet18")
    with pytest.raises(SpecError, match="unknown option width"):
        loaded(path, f"{kind},width=3")


def test_a_network_exported_in_training_mode_is_refused(tmp_path: Path) -> None:
    """Batch norm or dropout in training mode inside a graph is a CheckpointError with what to call before the export."""
    with pytest.raises(
        CheckpointError, match=re.escape("exported in training mode (torch.ops.aten.batch_norm.default); call model.eval()")
    ):
        loaded(export(network().train(), tmp_path / "train.pt2"))
    with pytest.raises(CheckpointError, match=r"exported in training mode \(BatchNormalization \); call model\.eval\(\)"):
        loaded(write_onnx(tmp_path / "train.onnx", training=True))


@pytest.mark.parametrize("name", FILES)
def test_the_digest_covers_every_byte(name: str, folder: Path, tmp_path: Path) -> None:
    """The digest is that of the file, and of the files beside it that hold its tensors."""
    first = loaded(folder / name).sha256
    for path in folder.glob(f"{name}*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert loaded(tmp_path / name).sha256 == first
    assert (first == sha256_file(folder / name)) == (name != "outside.onnx")
    if name == "outside.onnx":
        data = bytearray((tmp_path / "outside.onnx.data").read_bytes())
        data[0] ^= 1
        (tmp_path / "outside.onnx.data").write_bytes(data)
        assert loaded(tmp_path / name).sha256 != first


@pytest.mark.parametrize("name", ["dynamic.pt2", "dynamic.onnx"])
def test_bfloat16_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    """An exported network runs in float32: another precision is a ConfigError that says so."""
    with pytest.raises(ConfigError, match=re.escape("runs in float32, as it was exported; expected --precision float32 or auto")):
        dump(folder / name, "fashion-mini", tmp_path / "cache", precision="bfloat16", device="cpu")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["dynamic.pt2", "dynamic.onnx"])
def test_a_damaged_file_is_refused(name: str, share: float, folder: Path, tmp_path: Path) -> None:
    """An exported network that is cut short is a CheckpointError that names the file."""
    data = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
        loaded(tmp_path / name)


def test_operators_of_other_libraries_are_refused(tmp_path: Path) -> None:
    """An operator that a custom library would bring is refused by its name; no library is loaded."""
    with pytest.raises(CheckpointError, match=re.escape("has the operator mylab.ops:Relu, which would come from a library of its own")):
        loaded(write_onnx(tmp_path / "custom.onnx", domain="mylab.ops"))


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "..", "link"])
def test_tensors_lie_beside_the_file(place: str, tmp_path: Path) -> None:
    """A graph that asks for a file elsewhere, or for a link, is refused before it is read."""
    (tmp_path / "link").symlink_to("/etc/hostname")
    path = write_onnx(tmp_path / "m.onnx", outside=True)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = place
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=re.escape(f"keeps tensors in {place!r}; expected the name of a file that lies beside it")):
        loaded(path)


def tampered(source: Path, target: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of a `.pt2` whose members, by name without the archive's own, were changed."""
    with zipfile.ZipFile(source) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    edit(members)
    writer = torch._C.PyTorchFileWriter(str(target))
    for name, data in members.items():
        if not name.startswith((".data", "byteorder")):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return target


def in_program(change: Callable[[Document, str], None]) -> Callable[[dict[str, bytes], Path], None]:
    """An edit of the program's JSON, given code that makes a folder."""

    def edit(members: dict[str, bytes], made: Path) -> None:
        document = json.loads(members["models/model.json"])
        change(document, f"__import__('os').mkdir({str(made)!r})")
        members["models/model.json"] = json.dumps(document).encode()

    return edit


def sample_inputs(members: dict[str, bytes], made: Path) -> None:
    """A pickle of code instead of sample inputs."""
    buffer = io.BytesIO()
    torch.save((((Hostile(made),), {})), buffer)
    members["data/sample_inputs/model.pt"] = buffer.getvalue()


def pickled_weight(members: dict[str, bytes], made: Path) -> None:
    """A pickle of code instead of a tensor."""
    buffer = io.BytesIO()
    torch.save(Hostile(made), buffer)
    config = json.loads(members["data/weights/model_weights_config.json"])
    entry = config["config"]["0.weight"]
    entry["use_pickle"] = True
    members["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    members[f"data/weights/{entry['path_name']}"] = buffer.getvalue()


def opaque_constant(members: dict[str, bytes], made: Path) -> None:
    """A pickle of code as a constant."""
    config = json.loads(members["data/constants/model_constants_config.json"])
    config["config"]["x"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    members["data/constants/model_constants_config.json"] = json.dumps(config).encode()
    members["data/constants/opaque_obj_0"] = pickle.dumps(Hostile(made))


def formula(document: Document, code: str) -> None:
    """Code as the length of an axis."""
    document["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"][0]["as_expr"]["expr_str"] = code


def operator(document: Document, code: str) -> None:
    """A function of Python as an operator."""
    node = document["graph_module"]["graph"]["nodes"][0]
    node["target"], node["inputs"] = "torch.os.mkdir", [{"name": "", "arg": {"as_string": re.findall(r"'(/[^']*)'", code)[0]}, "kind": 1}]


def variable(document: Document, code: str) -> None:
    """Code as the name of an input, which becomes a variable of the program that PyTorch compiles."""
    text = json.dumps(document).replace('"name": "input"', json.dumps({"name": f"input={code}"})[1:-1])
    values = json.loads(text)
    values["graph_module"]["graph"]["tensor_values"][f"input={code}"] = document["graph_module"]["graph"]["tensor_values"]["input"]
    document.clear()
    document.update(values)


def container(document: Document, code: str) -> None:
    """A container that names a function to call."""
    context = {"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": []}
    spec = {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}
    document["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, spec])


ATTACKS = {
    "pickled weight": (pickled_weight, "keeps '0.weight' as a pickle or an object, and loading it could run code, so it is refused", True),
    "pickled constant": (opaque_constant, "keeps 'x' as a pickle or an object", True),
    "formula": (in_program(formula), "expected a name or a formula of shapes at 'expr_str'", True),
    "operator": (in_program(operator), "has the operator 'torch.os.mkdir'; kdcache runs PyTorch's own tensor operators", False),
    "variable": (in_program(variable), "expected a name or a formula of shapes at 'name'", False),
    "container": (in_program(container), "found a 'collections.defaultdict'", False),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_program_is_executed(attack: str, folder: Path, tmp_path: Path) -> None:
    """Code in whatever place PyTorch's own reader would run it is refused with the place, and is not run."""
    edit, message, runs = ATTACKS[attack]
    made = tmp_path / "made"
    path = tampered(folder / "dynamic.pt2", tmp_path / "hostile.pt2", lambda members: edit(members, made))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        loaded(path)
    assert not made.exists()
    if runs:
        with contextlib.suppress(Exception):  # it has run already
            torch.export.load(path)
        assert made.exists(), "the file is harmless: it proves nothing"


def test_sample_inputs_are_not_read(folder: Path, tmp_path: Path) -> None:
    """A program whose sample inputs are a pickle of code loads without them: they are never unpickled."""
    made = tmp_path / "made"
    path = tampered(folder / "dynamic.pt2", tmp_path / "hostile.pt2", lambda members: sample_inputs(members, made))
    assert answers(loaded(path).model, torch.rand(2, *SHAPE)).shape == (2, NUM_CLASSES)
    assert not made.exists()


@pytest.mark.slow
def test_exported_teachers_on_the_command_line(folder: Path) -> None:
    """A `.pt2`, an `.onnx`, and their average with a safetensors teacher, are dumped, and replayed, by the installed command."""
    torch.manual_seed(1)
    spec = Spec.parse("tiny,channels=1,image_size=28,num_classes=10")
    save_model(folder / "small.safetensors", build_model(spec, trusted=True), spec=spec, metadata={})
    common = ("--data", "fashion-mini,split=test", "--views", "1", "--batch-size", "500", "--device", "cpu")
    programs = ("--teacher", "static.pt2", "--teacher", "dynamic.onnx")
    for out, teachers in {"one": programs[:2], "two": programs[2:], "three": (*programs, "--teacher", "small.safetensors")}.items():
        summary = kdcache_json("dump", *teachers, *common, "--out", out, cwd=folder)
        manifest = json.loads((folder / out / "manifest.json").read_text())
        assert len(manifest["recipe"]["teacher"].get("members", [])) == (3 if out == "three" else 0)
        assert summary["blocks_computed"] == summary["blocks"]
    done = kdcache("verify", "three", "--replay", "16", *programs, "--teacher", "small.safetensors", "--device", "cpu", cwd=folder)
    assert "16 records replayed" in done.stdout
    refused = kdcache("dump", *programs, *common, "--precision", "bfloat16", "--out", "four", cwd=folder, exits=2)
    assert "runs in float32, as it was exported" in refused.stderr
    assert not (folder / "four").exists()
