"""ONNX files as teachers, by onnxruntime."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.programs import Axis, Program, Signature, loaded_program, read_options
from kdcache.records.errors import CheckpointError
from kdcache.records.hashing import sha256, sha256_file
from kdcache.records.specs import Spec

STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Operators that onnxruntime brings itself. Others would come from a library of somebody's, and none is ever loaded."""
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class OnnxProgram(Program):
    """A graph that onnxruntime runs: on CUDA where images are there and onnxruntime can, else on the CPU."""

    def __init__(self, path: Path, session: Any, signature: Signature) -> None:
        super().__init__(path, signature)
        self._session, self._on_cuda = session, False
        self._input, self._output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(self, images: Tensor) -> Tensor:
        """Images [batch, channels, height, width] to logits on the CPU."""
        if images.is_cuda and not self._on_cuda:
            self._session, self._on_cuda = _open_session(self.path, providers=(CUDA, CPU)), True
        (logits,) = self._session.run([self._output], {self._input: images.cpu().numpy()})
        return torch.from_numpy(logits)


def load_onnx(path: Path, *, num_classes: int, image_shape: tuple[int, ...], arch: Spec | None) -> LoadedModel:
    """Reads an ONNX file. Custom operator libraries are never loaded.

    Args:
        path: The `.onnx` file; tensors that lie outside it must be in files beside it.
        num_classes: Classes of the dataset.
        image_shape: Shape of one view: channels, height and width of images.
        arch: `onnx[,norm=…][,channels=…]`, or None.

    Raises:
        CheckpointError: onnxruntime is missing, or the file is damaged, unsafe, in training mode or no classifier of images.
        MismatchError: The network has another number of classes or channels than the dataset.
        SpecError: The architecture is no `onnx`.
    """
    spec = read_options(path, arch, "onnx")
    onnx = _import_extra("onnx")
    try:
        content = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises errors of its own
        raise CheckpointError(f"{path} is not a readable ONNX file: {error}") from error
    outside = _check_content(path, content)
    session = _open_session(path, providers=(CPU,))
    program = OnnxProgram(path, session, _signature(path, session))
    return loaded_program(program, spec, sha256=_digest(path, outside), num_classes=num_classes, image_shape=image_shape)


def _import_extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(f"an .onnx teacher needs {name}: pip install 'kdcache[onnx]' ({error})") from error


def _open_session(path: Path, *, providers: tuple[str, ...]) -> Any:
    runtime = _import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # its errors are raised too
    available = [provider for provider in providers if provider in runtime.get_available_providers()]
    try:
        return runtime.InferenceSession(path, options, providers=available)
    except Exception as error:  # onnxruntime's errors have no common class
        raise CheckpointError(f"onnxruntime cannot run {path}: {error}") from error


def _signature(path: Path, session: Any) -> Signature:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{entry.name}: {entry.type} {entry.shape}" for entry in inputs)
        raise CheckpointError(f"{path}: expected one input, float32 images [batch, channels, height, width], found {found}")
    if len(outputs) != 1 or outputs[0].type != "tensor(float)":
        found = ", ".join(f"{entry.name}: {entry.type} {entry.shape}" for entry in outputs)
        raise CheckpointError(f"{path}: expected one output, float32 logits [batch, classes], found {found}")
    batch, channels, height, width = (_axis(length) for length in inputs[0].shape)
    classes = _axis(outputs[0].shape[-1]) if outputs[0].shape else None
    return Signature(channels=channels, size=(height, width), batch=(batch or 1, batch), num_classes=classes)


def _axis(length: object) -> Axis:
    """Named axes, and nameless ones, have any length."""
    return length if isinstance(length, int) and length > 0 else None


def _check_content(path: Path, content: Any) -> list[str]:
    """Refuses what would run foreign code, and training; gives the names of the files beside it that hold tensors."""
    graph = content.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    domains = STANDARD_DOMAINS | {function.domain for function in content.functions}  # these are made of other nodes
    nodes = [node for part in (graph, *content.functions) for node in _nodes(part)]
    for node in nodes:
        if node.domain not in domains:
            raise CheckpointError(
                f"{path} has the operator {node.domain}:{node.op_type}, which would come from a library of its own; kdcache loads none."
                " Export it with standard operators"
            )
        if _is_training(node, constants):
            raise CheckpointError(f"{path} was exported in training mode ({node.op_type} {node.name}); call model.eval() before the export")
    outside = {entry.value for tensor in _tensors(graph, nodes) for entry in tensor.external_data if entry.key == "location"}
    for name in outside:
        if name in ("", "..") or Path(name).name != name or (path.parent / name).is_symlink() or not (path.parent / name).is_file():
            raise CheckpointError(f"{path} keeps tensors in {name!r}; expected the name of a file that lies beside it")
    return sorted(outside)


def _is_training(node: Any, constants: dict[str, Any]) -> bool:
    if any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute):
        return True
    if node.op_type != "Dropout" or len(node.input) < 3 or not node.input[2]:
        return False
    mode = constants.get(node.input[2])
    return mode is None or any(mode.raw_data) or any(mode.int32_data)


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph or function, those of inner graphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tensors(graph: Any, nodes: Sequence[Any]) -> Iterator[Any]:
    """All constant tensors: of the graph, of its nodes, and of the graphs inside them."""
    attributes = [attribute for node in nodes for attribute in node.attribute]
    inner = [inner for attribute in attributes for inner in (attribute.g, *attribute.graphs)]
    for part in (graph, *inner):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors, attribute.sparse_tensor.values, attribute.sparse_tensor.indices)


def _digest(path: Path, outside: list[str]) -> str:
    """Of the file; where tensors lie outside it, of the digests of all its files, the others by name."""
    digests = [sha256_file(path), *(f"{name}\0{sha256_file(path.parent / name)}" for name in outside)]
    return digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode())
