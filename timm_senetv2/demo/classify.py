"""A model and an image: the most probable classes, the gates of each block, and where the class is seen."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from .. import catalog
from ..create import check_options
from ..errors import UserError, one_line, printable
from ..gates import attention_layers

MOST_SIDE = 1024  # pixels of a model's input
_PASSES, _MOST_TIMING = 5, 0.5  # forward passes that are timed, and seconds after which no further one begins
_SHOWN_SIDE = 256  # pixels that a small input is enlarged to, to be looked at
_ONLY_GARMENTS = (
    'These weights have seen nothing but single garments, grey on black, 28 pixels wide. What they say of other images '
    'means nothing.'
)


class Gates(NamedTuple):
    """The gates of one block for one image.

    block: The name of the block in the model.
    values: One for each channel, float32.
    """

    block: str
    values: np.ndarray


@dataclass(frozen=True)
class Answer:
    """What a model says of an image.

    top: (class, probability), the most probable first, five at most.
    gates: For each block with attention, in the order of the forward pass; empty for a model without.
    seen: The image as it enters the network, cropped and scaled, in RGB.
    overlay: `seen` under the class-activation map of the first class; None where there is none.
    seconds: Of the forward pass, batch 1, as the model runs by itself; the fastest of a few.
    """

    top: list[tuple[str, float]]
    gates: list[Gates]
    seen: Image.Image
    overlay: Image.Image | None
    seconds: float


@dataclass
class Classifier:
    """A model in eval mode with what belongs to it.

    note: What a visitor should know about its weights, or nothing.
    """

    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    labels: Sequence[str]
    note: str = ''

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, image: Image.Image, wait: float = 60.0) -> Answer:
        """Look at an RGB image.

        Args:
            image: Of any size.
            wait: Seconds to wait for others that use this model; a pass that has begun is finished.

        Raises:
            UserError: Others still use it, or it gives no finite number.
        """
        if not self._lock.acquire(timeout=max(0.0, wait)):
            raise UserError('Many people are using this page; try again in a minute.')
        try:
            return self._answer(self.transform(image)[None])
        finally:
            self._lock.release()

    def _answer(self, x: Tensor) -> Answer:
        with torch.inference_mode():
            times: list[float] = []
            while len(times) < _PASSES and sum(times) < _MOST_TIMING:
                began = time.perf_counter()
                logits = self.model(x)
                times.append(time.perf_counter() - began)
        probabilities = logits[0].float().softmax(0)
        if not probabilities.isfinite().all():
            raise UserError('The model answers with numbers that are not finite; its weights are damaged.')
        values, indices = probabilities.topk(min(5, len(probabilities)))
        top = [(self.labels[int(i)], float(v)) for v, i in zip(values, indices, strict=True)]
        gates: dict[str, Tensor] = {}
        with recorded_gates(self.model, gates):
            heat = _heat(self.model, x, int(indices[0]))
        seen = self._seen(x)
        return Answer(
            top=top,
            gates=[Gates(block, tensor[0].numpy()) for block, tensor in gates.items()],
            seen=seen,
            overlay=None if heat is None else _overlay(seen, heat),
            seconds=min(times),
        )

    def _seen(self, x: Tensor) -> Image.Image:
        mean, std = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in (self.mean, self.std))
        pixels = (x[0] * std + mean).clamp(0, 1).mul(255).round().byte()
        image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
        if max(image.size) >= _SHOWN_SIDE:
            return image
        factor = _SHOWN_SIDE // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


@contextmanager
def recorded_gates(model: nn.Module, into: dict[str, Tensor]) -> Iterator[None]:
    """In this block, each forward pass of the model writes its gates into a dict: block name to (N, C), float32.

    Those of all layers that `timm_senetv2.gates` knows; none for a model without attention.
    """

    def record(block: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            into[block] = out.detach().flatten(1).float().cpu()

        return hook

    try:
        layers = attention_layers(model)
    except ValueError:
        layers = []
    handles = [layer.gate.register_forward_hook(record(layer.name.rpartition('.')[0])) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _heat(model: nn.Module, x: Tensor, target: int) -> np.ndarray | None:
    """Grad-CAM of one class at the last stage, (H, W) of the input, from 0 to 1; None where nothing speaks for it.

    Paper: `Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization`,
    https://arxiv.org/abs/1610.02391
    """
    from pytorch_grad_cam import GradCAM  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # type: ignore[import-untyped,import-not-found,unused-ignore]

    info = getattr(model, 'feature_info', None)
    name = info[-1]['module'] if info else ''
    shapes: list[int] = []
    if name in dict(model.named_modules()):
        layer = model.get_submodule(name)
        with layer.register_forward_hook(lambda module, args, out: shapes.append(getattr(out, 'ndim', 0))):
            with torch.no_grad():
                model(x)
    if shapes != [4]:  # no map of features, as in a transformer; the pass still gave the gates
        return None
    with torch.enable_grad(), GradCAM(model=model, target_layers=[layer]) as cam:
        heat: np.ndarray = cam(input_tensor=x.clone().requires_grad_(), targets=[ClassifierOutputTarget(target)])[0]
    return heat if np.isfinite(heat).all() and heat.max() > 0 else None


def _overlay(seen: Image.Image, heat: np.ndarray) -> Image.Image:
    import cv2
    from pytorch_grad_cam.utils.image import show_cam_on_image  # type: ignore[import-untyped,import-not-found,unused-ignore]

    heat = cv2.resize(heat, seen.size, interpolation=cv2.INTER_LINEAR)
    pixels = np.asarray(seen, np.float32) / 255
    return Image.fromarray(show_cam_on_image(pixels, heat.clip(0, 1), use_rgb=True, colormap=cv2.COLORMAP_INFERNO))


# --- Loading ---


def load(name: str, trusted: bool = True) -> Classifier:
    """A pretrained model with its preprocessing and the names of its classes, warmed up.

    Args:
        name: As `timm.create_model` takes it.
        trusted: False where a stranger chose it: then it must be a model of this package on the Hub, with options and
            a size that this machine can bear.

    Raises:
        UserError: It cannot be loaded, does not classify, or takes images of an unusual kind.
    """
    if not trusted:
        _check_stranger(name)
    shown = printable(name.rpartition('/')[2] if name.startswith('local-dir:') else name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the hidden units that a lift adds
            model = timm.create_model(name, pretrained=True).eval().requires_grad_(False)
    except Exception as e:  # of the Hub, the network, a file, or a configuration
        raise UserError(f'{shown} could not be loaded: {one_line(e)}') from e
    return _classifier(model, shown)


def _classifier(model: nn.Module, shown: str) -> Classifier:
    data: Mapping[str, Any] = resolve_model_data_config(model)
    channels, *size = data['input_size']
    if channels not in (1, 3) or not all(0 < side <= MOST_SIDE for side in size):
        raise UserError(
            f'{shown} takes inputs of {channels} × {size[0]} × {size[1]}; this page gives images of 1 or 3 channels '
            f'and at most {MOST_SIDE} × {MOST_SIDE} pixels.'
        )
    if catalog.classes_of(model) < 2:
        raise UserError(f'{shown} does not tell classes apart: it has {catalog.classes_of(model)}.')
    transform = create_transform(**data, is_training=False)
    mode = 'L' if channels == 1 else 'RGB'
    config = catalog.config_of(model)
    found = Classifier(
        model,
        lambda image: transform(image.convert(mode)),
        mean=data['mean'],
        std=data['std'],
        labels=_labels(config, catalog.classes_of(model)),
        note=_ONLY_GARMENTS if config.get('tag') == 'fmnist' else '',
    )
    with torch.inference_mode():
        model(torch.zeros(1, channels, *size))
    return found


def _labels(config: Mapping[str, Any], classes: int) -> list[str]:
    names = config.get('label_names')
    if isinstance(names, (list, tuple)) and len(names) == classes:
        return [printable(name, 80) for name in names]
    subset = infer_imagenet_subset(dict(num_classes=classes))  # goes by the number alone
    if subset is not None and re.search(r'in\d+k', str(config.get('tag'))):
        info = ImageNetInfo(subset)
        if info.num_classes() == classes:
            return [info.index_to_description(i) for i in range(classes)]
    return [f'class {i}' for i in range(classes)]


def _check_stranger(name: str) -> None:
    try:
        _, architecture, model_args = load_model_config_from_hf(name.removeprefix('hf-hub:'))
    except Exception as e:
        raise UserError(f'{name} could not be loaded: {one_line(e)}') from e
    if architecture not in catalog.names():
        raise UserError(f'{name} is no model of timm-senetv2.')
    try:
        check_options(architecture, model_args or {})
    except UserError as e:
        raise UserError(f'{name} cannot be used: {str(e).removeprefix("--model-kwargs: ")}') from None
