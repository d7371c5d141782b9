"""Programs of torch.export, `.pt2`, read without trusting them.

`torch.export.load` is no safe reader: it unpickles, hands shapes to `sympify`, which evaluates them, looks operators up anywhere below
`torch`, and compiles the graph's names as Python. So nothing is handed to it as it was found. The archive is taken apart here; what a
network needs is checked against lists of what is known to be harmless, names and formulas included; and PyTorch reads an archive that
is written anew from these parts alone. The kernels of PyTorch's own operators are trusted, as with any weights.
"""

import ast
import io
import json
import keyword
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.programs import Axis, Program, Signature, loaded_program, read_options
from kdcache.records.errors import CheckpointError
from kdcache.records.hashing import sha256_file
from kdcache.records.specs import Spec

MODEL, WEIGHTS, CONSTANTS = "models/model.json", "data/weights/", "data/constants/"
CONFIGS = {WEIGHTS: "model_weights_config.json", CONSTANTS: "model_constants_config.json"}
TENSOR_FILE = re.compile(r"(weight|tensor)_\d+")
NAME = re.compile(r"[A-Za-z0-9_]*")
TEXT = re.compile(r"[\w ,.>()-]*", re.ASCII)
"""String arguments of operators: `bilinear`, `tanh`, `bij,bjk->bik`."""
OPERATOR = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
FILE_OPERATORS = frozenset({"from_file", "save"})
NUMBER_OPERATORS = frozenset(
    {f"_operator.{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge", "getitem")}
    | {f"torch.sym_{name}" for name in ("float", "int", "max", "min", "not", "ite")}
    | {f"math.{name}" for name in ("ceil", "floor", "trunc")}
)  # fmt: skip
FORMULA_TEXT = re.compile(r"[\w ,.()+*/%<>='-]{1,1000}", re.ASCII)
FORMULA_FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "FloorDiv", "PythonMod", "CleanDiv", "CeilDiv"}
)
CONTAINERS = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict"})
MODES = frozenset({"training", "train"})
TEXT_KINDS = frozenset({"as_string", "as_strings"})
DOTTED_KINDS = frozenset({"target", "key", "fqn", "parameter_name", "buffer_name", "tensor_constant_name"})
"""Where names of parameters and operators stand, of several parts. The names of values become those of variables."""
REFUSED_KINDS = frozenset({"as_graph", "as_operator", "as_custom_obj"})
FLOAT32 = 7
"""In the numbers of torch.export's schema."""
NO_LIMIT = 2**31
"""A range that ends beyond this has no end."""


class ExportedNetwork(Program):
    """A program of torch.export.

    It is no submodule: its mode was fixed when it was exported, and its tensors must stay laid out as its graph expects them.
    """

    def __init__(self, path: Path, exported: ExportedProgram, signature: Signature) -> None:
        super().__init__(path, signature)
        self._exported, self._graph, self._device = exported, [exported.module()], torch.device("cpu")

    def run(self, images: Tensor) -> Tensor:
        """Images [batch, channels, height, width] to logits."""
        if images.device != self._device:
            self._exported, self._device = move_to_device_pass(self._exported, images.device), images.device
            self._graph = [self._exported.module()]
        with torch.no_grad():
            logits: Tensor = self._graph[0](images)
        return logits


def load_exported(path: Path, *, num_classes: int, image_shape: tuple[int, ...], arch: Spec | None) -> LoadedModel:
    """Reads a program that `torch.export.save` wrote, and runs nothing from it but PyTorch's own operators.

    Args:
        path: The `.pt2` file.
        num_classes: Classes of the dataset.
        image_shape: Shape of one view: channels, height and width of images.
        arch: `pt2[,norm=…][,channels=…]`, or None.

    Raises:
        CheckpointError: The file is damaged, from another version of PyTorch, in training mode, no classifier of images, or holds
            anything but tensors and a graph of PyTorch's operators.
        MismatchError: The network has another number of classes or channels than the dataset.
        SpecError: The architecture is no `pt2`.
    """
    spec = read_options(path, arch, "pt2")
    try:
        parts = _read_parts(path)
        program = _checked_program(path, json.loads(parts[MODEL]))
        signature = _signature(path, program)
        network = ExportedNetwork(path, torch.export.load(io.BytesIO(_rewritten(path, parts, program))), signature)
    except CheckpointError:
        raise
    except Exception as error:  # PyTorch's reader raises almost anything on damaged content
        raise CheckpointError(
            f"{path} cannot be read as a program of torch.export by PyTorch {torch.__version__}: {error}. Export it again with this version"
        ) from error
    return loaded_program(network, spec, sha256=sha256_file(path), num_classes=num_classes, image_shape=image_shape)


def _read_parts(path: Path) -> dict[str, bytes]:
    """The archive's members by their names without the archive's own; the sample inputs, a pickle, are left where they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            if len(names) < len(archive.namelist()):
                raise CheckpointError(f"{path} has two members of one name; a program of torch.export has not")
            wanted = [name for name in names if name == MODEL or name.startswith((WEIGHTS, CONSTANTS))]
            if any(archive.getinfo(names[name]).compress_type != zipfile.ZIP_STORED for name in wanted):
                raise CheckpointError(f"{path} is compressed; a program of torch.export is not")
            parts = {name: archive.read(names[name]) for name in wanted}
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} is not a readable .pt2 file: {error}") from error
    missing = [name for name in (MODEL, *(folder + config for folder, config in CONFIGS.items())) if name not in parts]
    if missing:
        raise CheckpointError(
            f"{path} has no {missing[0]}; expected one program that torch.export.save of PyTorch 2.9 or later wrote; export it again"
        )
    return parts


def _rewritten(path: Path, parts: dict[str, bytes], program: dict[str, Any]) -> bytes:
    """An archive of the checked parts and nothing else."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    written = {MODEL: json.dumps(program).encode(), "data/sample_inputs/model.pt": b"", "archive_format": b"pt2", "archive_version": b"0"}
    for folder, config_name in CONFIGS.items():
        config = json.loads(parts[folder + config_name])
        written[folder + config_name] = json.dumps(_checked_payloads(path, config)).encode()
        for entry in config["config"].values():
            written[folder + entry["path_name"]] = parts[folder + entry["path_name"]]
    for name, data in written.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return buffer.getvalue()


def _checked_payloads(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The list of tensors, each as raw numbers."""
    for name, entry in document["config"].items():
        if entry["use_pickle"] or not TENSOR_FILE.fullmatch(entry["path_name"]):
            raise CheckpointError(
                f"{path} keeps {_shown(name)} as a pickle or an object, and loading it could run code, so it is refused. Export a network"
                " whose weights are plain tensors"
            )
    _check_strings(path, document)
    return document


def _checked_program(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The program without what only people read, after a look at everything in it that PyTorch would look up, evaluate or compile."""
    graph_module = document["graph_module"]
    graph = graph_module["graph"]
    for node in graph["nodes"]:
        node["metadata"] = {}
        _check_operator(path, node)
    if graph.get("custom_obj_values") or graph_module.get("treespec_namedtuple_fields"):
        raise CheckpointError(f"{path} holds objects besides tensors, so it is refused")
    for call in graph_module["module_call_graph"]:
        if call["signature"]:
            _check_containers(path, call["signature"]["in_spec"])
            _check_containers(path, call["signature"]["out_spec"])
    graph_module["metadata"], document["guards_code"] = {}, []
    _check_strings(path, document)
    return document


def _check_operator(path: Path, node: dict[str, Any]) -> None:
    """PyTorch's own operators and arithmetic of shapes, in evaluation mode."""
    target = node["target"]
    found = OPERATOR.fullmatch(target)
    known = found and found[1] not in FILE_OPERATORS and torch._C._dispatch_has_kernel(_dispatcher_name(found[1], found[2]))
    if not (known or target in NUMBER_OPERATORS):
        raise CheckpointError(
            f"{path} has the operator {_shown(target)}; kdcache runs PyTorch's own tensor operators (torch.ops.aten) alone, as another could"
            " run any code. Export the network without it: in eval mode, without control flow, autocast or no_grad inside"
        )
    if any(entry.get("name") in MODES and entry["arg"].get("as_bool") for entry in node["inputs"]):
        raise CheckpointError(f"{path} was exported in training mode ({target}); call model.eval() before torch.export.export")


def _dispatcher_name(name: str, overload: str) -> str:
    return f"aten::{name}" if overload == "default" else f"aten::{name}.{overload}"


def _check_containers(path: Path, text: str) -> None:
    """Arguments and results are tensors in tuples, lists and dictionaries: other containers name Python classes."""

    def visit(spec: dict[str, Any]) -> None:
        context = json.loads(spec["context"]) if spec["context"] else None
        plain = context is None or (isinstance(context, list) and all(isinstance(key, str) and NAME.fullmatch(key) for key in context))
        if spec["type"] not in CONTAINERS or not plain:
            raise CheckpointError(f"{path}: expected arguments and results that are tensors, found a {_shown(spec['type'])}")
        for child in spec["children_spec"]:
            visit(child)

    visit(json.loads(text)[1])


def _check_strings(path: Path, document: Any) -> None:
    """Every word is a name, every formula one of shapes: none says anything when it is evaluated, compiled or looked up."""
    for key, value in _strings(document):
        if key in REFUSED_KINDS:
            raise CheckpointError(f"{path} holds a {key.removeprefix('as_')} among its operators' arguments, so it is refused")
        if key == "expr_str":
            harmless = _is_formula(value)
        elif key in TEXT_KINDS:
            harmless = bool(TEXT.fullmatch(value))
        elif key in ("in_spec", "out_spec", "torch_version"):
            continue  # looked at, or not used
        else:
            harmless = all(_is_name(part) for part in (value.split(".") if key in DOTTED_KINDS else [value]))
        if not harmless:
            raise CheckpointError(f"{path}: expected a name or a formula of shapes at {_shown(key)}, found {_shown(value)}; it is refused")


def _strings(document: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string with the key that it stands at, every key that is one of many, and every kind of value."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield ("key", name) if name not in REFUSED_KINDS else (name, "")
            yield from _strings(value, name)
    elif isinstance(document, list):
        for value in document:
            yield from _strings(value, key)
    elif isinstance(document, str):
        yield key, document


def _is_name(text: str) -> bool:
    return bool(NAME.fullmatch(text)) and not text.startswith("__") and not keyword.iskeyword(text)


def _is_formula(text: str) -> bool:
    """Numbers, symbols such as `Symbol('s31', positive=True)`, arithmetic and the functions of shapes."""
    if not FORMULA_TEXT.fullmatch(text):
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FORMULA_FUNCTIONS
    if isinstance(node, ast.Name):
        return node.id in FORMULA_FUNCTIONS or re.fullmatch(r"[su]\d+", node.id) is not None
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) or (isinstance(node.value, str) and re.fullmatch(r"[a-z]+\d+", node.value) is not None)
    arithmetic = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context)
    return isinstance(node, (*arithmetic, ast.keyword))


def _signature(path: Path, program: dict[str, Any]) -> Signature:
    graph, spec = program["graph_module"]["graph"], program["graph_module"]["signature"]
    images = [entry["user_input"]["arg"] for entry in spec["input_specs"] if "user_input" in entry]
    logits = [entry["user_output"]["arg"] for entry in spec["output_specs"] if "user_output" in entry]
    if len(images) != 1 or len(logits) != 1 or any("as_tensor" not in argument for argument in (*images, *logits)):
        raise CheckpointError(
            f"{path}: expected one input, images [batch, channels, height, width], and one output, logits; found {len(images)} and"
            f" {len(logits)}"
        )
    values = [graph["tensor_values"][argument["as_tensor"]["name"]] for argument in (images[0], logits[0])]
    taken, given = (value["sizes"] for value in values)
    if len(taken) != 4 or not given or values[0]["dtype"] != FLOAT32:
        raise CheckpointError(
            f"{path}: expected float32 images [batch, channels, height, width], found an input of {len(taken)} axes or another type"
        )
    _, channels, height, width = (_axis(length) for length in taken)
    return Signature(channels=channels, size=(height, width), batch=_batch(taken[0], program), num_classes=_axis(given[-1]))


def _axis(length: dict[str, Any]) -> Axis:
    value = length.get("as_int")
    return value if isinstance(value, int) else None


def _batch(length: dict[str, Any], program: dict[str, Any]) -> tuple[int, int | None]:
    """The one batch size, or the range that the program was exported for."""
    if "as_int" in length:
        return int(length["as_int"]), int(length["as_int"])
    symbol = re.search(r"[su]\d+", length["as_expr"]["expr_str"])
    limits = program["range_constraints"].get(symbol[0] if symbol else "", {})
    smallest, largest = limits.get("min_val") or 1, limits.get("max_val")
    return max(1, int(smallest)), int(largest) if largest is not None and largest < NO_LIMIT else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
