"""Bytes of a (class, value) entry, and what the coding costs: kdcache beside other layouts of the same records.

Run: python tests/benchmarks/size.py            (about four minutes on two cores; prints Markdown)
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from kdcache.data import embedded_teacher
from measuring import ROWS, machine, make_store, realistic_blocks, table
from numpy.typing import NDArray
from synthetic import realistic_logits

from kdcache.learning.checkpoints import load_model
from kdcache.learning.datasets import open_dataset
from kdcache.learning.fidelity import FullAnswers
from kdcache.records.specs import Spec
from kdcache.targets.codecs import Codec, make_codec
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.convert import convert

TEMPERATURES = (1.0, 2.0, 4.0)

Layout = Callable[[NDArray[Any], NDArray[Any]], list[NDArray[Any]]]
"""(classes, log-probabilities), both [records, k], to the columns of a record."""


def rs_kd_words(classes: NDArray[Any], log_probs: NDArray[Any]) -> NDArray[np.uint8]:
    """Class in 17 bits and probability in 7 as three bytes."""
    words = classes.astype(np.uint32) << np.uint32(7) | (np.exp(log_probs) * 127).round().astype(np.uint32)
    return words.astype("<u4")[..., None].view(np.uint8)[..., :3].reshape(len(classes), -1)


PEERS: dict[str, Layout] = {
    "TinyViT: int16 class, float16 value, 4-byte seed a view": lambda classes, values: [
        classes.astype("<i2"), values.astype("<f2"), np.arange(len(classes), dtype="<i4")[:, None],
    ],
    "RS-KD: 17 + 7 bits": lambda classes, values: [rs_kd_words(classes, values)],
    "FKD: int32 class, float32 value": lambda classes, values: [classes.astype("<i4"), values.astype("<f4")],
    "MaxText-like: int32 class, float16 value": lambda classes, values: [classes.astype("<i4"), values.astype("<f2")],
    "Megatron-LM-like: int32 class, one byte a value": lambda classes, values: [
        classes.astype("<i4"), (np.exp(values) * 255).round().astype(np.uint8),
    ],
}  # fmt: skip
"""Records as these systems lay them out. DistillKit fits curves and reports 2.3 to 2.7 bytes an entry, lossy: not written out here."""


def added_kl(logits: torch.Tensor, soft: SoftTargets, temperature: float) -> float:
    """Mean KL(exact kept classes and tail ‖ decoded ones) in nats: what the coding alone adds, beside the truncation."""
    exact = (logits.double() / temperature).softmax(-1)
    kept = exact if soft.index is None else torch.where(soft.kept, exact.gather(-1, soft.index), 0.0)
    decoded, mass = soft.probs_at(temperature)
    p = torch.cat([kept, (1 - kept.sum(-1, keepdim=True)).clamp(min=0)], -1)
    q = torch.cat([decoded, mass.unsqueeze(-1)], -1).double()
    return torch.where(p > 1e-12, p * (p.clamp(min=1e-12).log() - q.clamp(min=1e-12).log()), 0.0).sum(-1).mean().item()


def embedded_logits() -> torch.Tensor:
    """What the embedded teacher says of 2,000 test images."""
    teacher = load_model(embedded_teacher(), num_classes=10, image_shape=(1, 28, 28)).model
    dataset = open_dataset(Spec.parse("fashion-mini,split=test"), trusted=True)
    with torch.inference_mode():
        logits: torch.Tensor = teacher(torch.stack([dataset[row][0] for row in range(2000)]).float() / 255)
    return logits


def codec_row(title: str, text: str, codec: Codec, logits: torch.Tensor) -> str:
    """Mapped and compact bytes of records of these logits, without tables and keys, and the KL that coding adds."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        manifest = make_store(root / "mapped", codec, iter([logits]), num_blocks=1, num_rows=len(logits))
        packed = convert(root / "mapped", root / "compact", layout="compact").manifest
    mapped, compact = (sum(file.size_bytes for block in made.blocks for file in block.files) / len(logits) for made in (manifest, packed))
    tables = sum(file.size_bytes for file in packed.metadata_files if "profile" in file.path or "order" in file.path)
    few = logits[:2048]
    soft = codec.decode(codec.encode(few, range(len(few))))
    added = ", ".join(f"{added_kl(few, soft, t):.1e}" for t in TEMPERATURES) if soft.sampled_at is None else "unbiased"
    entries = manifest.statistics.entries
    return (
        f"{title} | `{text}` | {entries:.4g} | {mapped:.2f} | {compact:.2f} | {mapped / entries:.2f} | {compact / entries:.2f} |"
        f" {tables:,} | {added}"
    )


def rows() -> Iterator[str]:
    """One line for each teacher and codec."""
    real = embedded_logits()
    for text in ("topk,k=5", "adaptive,mean_k=3", "dense,dtype=uint8", "dense"):
        codec = make_codec(Spec.parse(text), num_classes=10).calibrated(real)
        yield codec_row("embedded teacher, 10 classes", text, codec, real)
    logits = next(realistic_blocks(1))
    for text in (
        "topk,k=10",
        "topk,k=16",
        "topk,k=16,levels=94",
        "topk,k=32",
        "topk,k=100",
        "topk,k=16,values=float16",
        "adaptive,mean_k=10",
        "sampled,draws=50",
    ):
        codec = make_codec(Spec.parse(text), num_classes=1000).calibrated(logits[:2048])
        yield codec_row(f"realistic, 1000 classes, {ROWS:,} records", text, codec, logits)
    tokens = realistic_logits(4096, 128_000, chunk=512)[0]
    codec = make_codec(Spec.parse("topk,k=64"), num_classes=128_000)
    yield codec_row("tokens, 128,000 classes, 4,096 records", "topk,k=64", codec, tokens)


def peers() -> Iterator[str]:
    """The same records as other systems lay them out, written to files; and after zstd, which none but Megatron-LM applies."""
    log_probs = next(realistic_blocks(1)).log_softmax(-1)
    for title, layout in PEERS.items():
        found = []
        for k in (10, 16, 32, 100):
            values, classes = log_probs.topk(k)
            columns = [np.ascontiguousarray(column).view(np.uint8) for column in layout(classes.numpy(), values.numpy())]
            with tempfile.TemporaryFile() as file:
                np.concatenate([column.reshape(len(values), -1) for column in columns], axis=1).tofile(file)
                file.seek(0, os.SEEK_END)
                size = file.tell()
            packed = sum(len(pa.compress(column.tobytes(), "zstd", asbytes=True)) for column in columns)
            found.append(f"{size / values.numel():.2f} ({packed / values.numel():.2f})")
        yield f"{title} | " + " | ".join(found)


def entries_at_equal_kl() -> Iterator[str]:
    """How many entries `adaptive` needs for the KL(full ‖ cached, uniform tail) of a fixed k."""
    logits = realistic_logits(8192, seed=3)[0]
    for temperature in (1.0, 4.0):
        full = FullAnswers(logits[4096:], temperatures=(temperature,), temperature=temperature)
        for k in (5, 16, 32):
            fixed = make_codec(Spec.parse(f"topk,k={k},temperatures=({temperature},)"), num_classes=1000)
            kl = full.divergence(fixed.decode(fixed.encode(logits[4096:])), temperature, "uniform").mean().item()
            text = f"adaptive,kl={kl},temperature={temperature},temperatures=({temperature},),max_k=256"
            adaptive = make_codec(Spec.parse(text), num_classes=1000).calibrated(logits[:4096])
            soft = adaptive.decode(adaptive.encode(logits[4096:]))
            found, mean_k = full.divergence(soft, temperature, "uniform").mean().item(), soft.kept.sum(-1).float().mean().item()
            yield f"{temperature:g} | {k} | {kl:.4f} | {mean_k:.2f} | {found:.4f} | {1 - mean_k / k:.0%}"


def main() -> None:
    """Prints the tables."""
    print(machine())
    table(
        "logits|codec|entries|mapped B a record|compact B a record|mapped B an entry|compact B an entry|table that gives the order, B|KL that coding adds at T=1, 2, 4",
        rows(),
    )
    table("other layouts, B an entry (after zstd)|k=10|k=16|k=32|k=100", peers())
    table("T|fixed k|its KL|mean k of `adaptive`|its KL on other samples than it was calibrated on|entries saved", entries_at_equal_kl())


if __name__ == "__main__":
    main()
