"""Logits with the structure of a real teacher's, for measuring codecs without one.

Classes sit in a three-level hierarchy (group, family, class) of low-rank embeddings, so those near in it come up
together; a sample's feature is its class's embedding plus noise, times a confidence of its own. From 30,000 classes on
they are tokens: their frequencies follow Zipf's law, and what comes up beside it depends on the context.

What comes out at T=1 (4096 samples of 1000 classes; 1024 of 128,000):

| | accuracy | largest probability | entropy (nat) | top-5 | top-16 | top-64 |
|---|---|---|---|---|---|---|
| 1,000 | 0.854 | 0.709 | 1.222 | 0.890 | 0.949 | 0.982 |
| 128,000 | 0.459 | 0.618 | 1.632 | 0.835 | 0.923 | 0.974 |

Run: python tests/benchmarks/synthetic.py            (prints that table)
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

RANK = 128
"""Length of embeddings and features: the rank of a matrix of logits, that of the penultimate layer in a real model."""

TOKENS_FROM = 30_000
"""Class counts from which on the classes are tokens of a language, not categories of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confidence:
    """How far a setting's logits spread; fitted to the statistics above."""

    median: float
    """Of the factor between a feature's agreement with a class and that class's logit, in nats."""

    spread: float
    """Standard deviation of that factor's logarithm over samples: some are easy, others hard."""

    noise: float
    """Length of the noise beside an embedding's, which is 1."""

    group_share: float
    """Part of an embedding's squared length that all classes of a group share."""

    family_share: float
    """Part of it that all classes of a family share beyond that."""


IMAGES = Confidence(median=16.5, spread=0.24, noise=2.28, group_share=0.22, family_share=0.43)
TOKENS = Confidence(median=19.0, spread=0.1, noise=3.6, group_share=0.2, family_share=0.74)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassStructure:
    """What a teacher knows of its classes: the same for all samples."""

    embedding: Float32[Tensor, "rank classes"]
    """Unit columns; those of classes near in the hierarchy point the same way."""

    log_frequency: Float32[Tensor, "classes"]
    """Logarithm of how often each class is the true one."""

    confidence: Confidence


def class_structure(num_classes: int, *, seed: int = 0) -> ClassStructure:
    """The classes of one teacher.

    Args:
        num_classes: Their number; from `TOKENS_FROM` on they are tokens.
        seed: Another one, another hierarchy.
    """
    generator = torch.Generator().manual_seed(2**31 + seed)  # no stream that samples are drawn from
    tokens = num_classes >= TOKENS_FROM
    confidence = TOKENS if tokens else IMAGES
    num_groups, num_families = math.ceil(num_classes ** (1 / 3)), math.ceil(num_classes ** (2 / 3))
    family_of_class = torch.randint(num_families, (num_classes,), generator=generator)
    group_of_family = torch.randint(num_groups, (num_families,), generator=generator)
    groups, families, own = (torch.randn(RANK, number, generator=generator) for number in (num_groups, num_families, num_classes))
    embedding = own.mul_(math.sqrt(1 - confidence.group_share - confidence.family_share))
    embedding += (families * math.sqrt(confidence.family_share) + groups[:, group_of_family] * math.sqrt(confidence.group_share))[
        :, family_of_class
    ]
    return ClassStructure(
        embedding=torch.nn.functional.normalize(embedding, dim=0),
        log_frequency=(_zipf_weights(num_classes) if tokens else torch.ones(num_classes)).log().log_softmax(dim=-1),
        confidence=confidence,
    )


def _zipf_weights(num_classes: int) -> Float32[Tensor, "classes"]:
    """How often each token comes up, the most frequent first: as 1/rank for the common ones, as 1/rank² for the rare.

    Source: Ferrer i Cancho and Solé 2001, "Two regimes in the frequency of words", whose two exponents meet near rank 5000.
    """
    rank = torch.arange(1, num_classes + 1, dtype=torch.float32)
    return 1 / (rank * (1 + rank / 5000))


def sample_logits(
    structure: ClassStructure, num_samples: int, *, seed: int
) -> tuple[Float32[Tensor, "samples classes"], Int64[Tensor, "samples"]]:
    """Logits and true classes of some samples; many make a data set piece by piece, each piece with a seed of its own."""
    confidence = structure.confidence
    generator = torch.Generator().manual_seed(seed)
    labels = structure.log_frequency.exp().multinomial(num_samples, replacement=True, generator=generator)
    noise = torch.randn(num_samples, RANK, generator=generator) * (confidence.noise / math.sqrt(RANK))
    factor = confidence.median * (torch.randn(num_samples, 1, generator=generator) * confidence.spread).exp()
    features = (structure.embedding[:, labels].T + noise) * factor
    return torch.addmm(structure.log_frequency, features, structure.embedding), labels


def realistic_logits(
    num_samples: int, num_classes: int = 1000, *, seed: int = 0, chunk: int = 4096
) -> tuple[Float32[Tensor, "samples classes"], Int64[Tensor, "samples"]]:
    """Logits and true classes of one teacher's answers.

    Args:
        num_samples: Rows.
        num_classes: Columns; from `TOKENS_FROM` on they are tokens.
        seed: Of the classes and of the samples. Equal arguments give equal logits.
        chunk: Rows made at a time, each chunk from a seed of its own.
    """
    structure = class_structure(num_classes, seed=seed)
    logits, labels = torch.empty(num_samples, num_classes), torch.empty(num_samples, dtype=torch.int64)
    for number, start in enumerate(range(0, num_samples, chunk)):
        rows = slice(start, min(start + chunk, num_samples))
        logits[rows], labels[rows] = sample_logits(structure, rows.stop - start, seed=(seed << 20) + number)
    return logits, labels


def statistics(logits: Float[Tensor, "samples classes"], labels: Int64[Tensor, "samples"]) -> dict[str, float]:
    """Means at T=1 of what the table above names."""
    log_probs = logits.log_softmax(dim=-1)
    top = log_probs.topk(64, dim=-1).values.exp()
    return {
        "accuracy": (logits.argmax(dim=-1) == labels).float().mean().item(),
        "largest probability": top[:, 0].mean().item(),
        "entropy (nat)": torch.special.entr(log_probs.exp_()).sum(dim=-1).mean().item(),
        **{f"top-{k}": top[:, :k].sum(dim=-1).mean().item() for k in (5, 16, 64)},
    }


def main() -> None:
    """Prints the statistics table."""
    for num_samples, num_classes in ((4096, 1000), (1024, 128_000)):
        found = statistics(*realistic_logits(num_samples, num_classes, chunk=512))
        if num_classes == 1000:
            print("| |", " | ".join(found), "|\n" + "|---" * (len(found) + 1) + "|")
        print(f"| {num_classes:,} |", " | ".join(f"{value:.3f}" for value in found.values()), "|")


if __name__ == "__main__":
    main()
