"""`kdcache models`: the model specs that are known."""

from dataclasses import dataclass

import torchvision

from kdcache.learning.models import PRESETS, build_model
from kdcache.records.specs import Spec


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelListing:
    """One model that `--model`, `--student` and `--arch` accept."""

    spec: str
    """What to type."""
    num_parameters: int | None
    """For ten classes and 28×28 grey images; None where that would mean building something large."""
    summary: str
    """One line."""


def list_models() -> list[ModelListing]:
    """The presets, torchvision's classification models, and the form of a model of one's own."""
    listings = []
    for name, preset in PRESETS.items():
        spec = Spec(source="", name=name, options={"num_classes": 10, "channels": 1, "image_size": 28})
        parameters = sum(parameter.numel() for parameter in build_model(spec, trusted=True).parameters())
        listings.append(ModelListing(spec=name, num_parameters=parameters, summary=preset.summary))
    names = torchvision.models.list_models(module=torchvision.models)
    listings += [ModelListing(spec=f"torchvision:{name}", num_parameters=None, summary="torchvision") for name in names]
    listings.append(ModelListing(spec="timm:NAME", num_parameters=None, summary="timm's networks; pip install 'kdcache[timm]'"))
    listings.append(
        ModelListing(spec="py:MODULE:FUNCTION", num_parameters=None, summary="your own function that returns a torch.nn.Module")
    )
    return listings
