"""Class-activation maps by the package grad-cam, with a model's own gates and with mean ones.

`Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization` - https://arxiv.org/abs/1610.02391
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .catalog import config_of
from .gates import attention_layers, replaced_gates


class View(NamedTuple):
    """What a model makes of an image: the class it names, its probability, and a map of the class, (H, W), 0 to 1."""

    predicted: str
    probability: float
    map: torch.Tensor


class Overlay(NamedTuple):
    """An image as the model sees it, (3, H, W), 0 to 1; its class; the views with its own and with mean gates."""

    image: torch.Tensor
    label: str
    own: View
    fixed: View


def overlays(
    model: nn.Module,
    images: Sequence[tuple[torch.Tensor, str]],
    gates: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
) -> list[Overlay]:
    """Maps of the class that the model names, at the output of the block that holds its last layer of attention.

    Both maps of an image are of the class that the model names with the image's own gates.

    Args:
        model: In eval mode; its config has mean and std of its images.
        images: (3, H, W) as the model takes them, and the name of the class.
        gates: Mean gates, (C,), of each layer by name.
        outputs: Names of the model's outputs.
    """
    from pytorch_grad_cam import GradCAM  # type: ignore[import-untyped]
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # type: ignore[import-untyped]

    layers = attention_layers(model)
    last = max(layers, key=lambda layer: list(gates).index(layer.name))
    block = model.get_submodule(last.name.rpartition('.')[0] or last.name)
    config = config_of(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    weight = next(model.parameters())

    made = []
    for image, label in images:
        batch = image[None].to(weight)
        targets: list[Any] | None = None
        views = []
        for fixed in (False, True):
            with (
                replaced_gates(layers, gates) if fixed else contextlib.nullcontext(),
                GradCAM(model=model, target_layers=[block]) as cam,
            ):
                with torch.no_grad():
                    probabilities = model(batch)[0].float().softmax(0).cpu()
                best = int(probabilities.argmax())
                targets = targets or [ClassifierOutputTarget(best)]
                found = torch.as_tensor(cam(input_tensor=batch, targets=targets)[0])
            views.append(View(outputs[best], float(probabilities[best]), found.nan_to_num()))
        made.append(Overlay((image.cpu().float() * std + mean).clamp(0, 1), label, *views))
    return made
