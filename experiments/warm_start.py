"""How a model starts: from scratch, or from weights of another training, lifted or with attention added.

    MODEL                  from scratch
    MODEL@keep             the weights of --init, which are of the same architecture and are not trained
    MODEL@continue         from the weights of --init, which are of the same architecture
    MODEL@lift             MODEL has SaE, --init has SE in the same places: its hidden units, and fresh ones beside them
    MODEL@add_attention    from the weights of --init without attention, then `timm_senetv2.add_attention`

A classifier for other classes than those of --init is new. What is new depends on the run's seed.
"""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from timm_senetv2 import SqueezeAggregatedExcitation, catalog
from timm_senetv2.checkpoints import save as save_weights
from timm_senetv2.create import check_options, why_not_built
from timm_senetv2.errors import UserError, one_line, printable
from timm_senetv2.lifting import SE_CLASSES

from .settings import ModelSpec

ATTENTION: tuple[type[nn.Module], ...] = (SqueezeAggregatedExcitation, *SE_CLASSES)


@dataclass(frozen=True)
class Source:
    """Trained weights to start from.

    Attributes:
        name: As the command line has it.
        architecture: Name of its model in timm.
        state_dict: Its weights, on the CPU.
        num_classes: Of its classifier.
        sha256: Of its weights, whatever file they were in.
    """

    name: str
    architecture: str
    state_dict: dict[str, torch.Tensor] = field(repr=False)
    num_classes: int
    sha256: str


def load_source(name: str) -> Source:
    """Read the weights to start from.

    Args:
        name: A folder that timm loads as local-dir, as --save-weights writes it, or a timm name with a tag.

    Raises:
        UserError: Neither, or one that cannot be loaded.
    """
    model: Any
    try:
        if timm.is_model(name) and '.' in name:
            model = timm.create_model(name, pretrained=True)
        else:
            model = timm.create_model(f'local-dir:{name}', pretrained=True)
    except Exception as e:  # a missing or damaged file shows as anything
        raise UserError(
            f'--init {printable(name)} cannot be loaded ({one_line(e)}); give a folder that --save-weights wrote, or '
            f'the name of a model in timm with its tag, such as cifar_resnet20.fmnist'
        ) from None
    state = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f'{key} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    architecture = model.pretrained_cfg['architecture']
    return Source(name, architecture, state, model.num_classes, digest.hexdigest())


def build(spec: ModelSpec, num_classes: int, source: Source | None = None, shapes_only: bool = False) -> nn.Module:
    """The model of a spec, where training starts.

    Args:
        spec: Name, options and start.
        num_classes: Of the data.
        source: The weights to start from, which every start but 'scratch' needs; not for shapes alone.
        shapes_only: Build it on the meta device, without loading weights.

    Raises:
        UserError: Options that the model does not take, or weights that do not fit; names the model.
    """
    load = spec.start != 'scratch'
    if load and source is None and not shapes_only:
        raise UserError(f'{spec} starts from trained weights; say which by --init')
    if spec.start == 'keep' and source is not None and source.num_classes != num_classes:
        raise UserError(
            f'{spec}: the weights of --init tell {source.num_classes} classes apart, and there are {num_classes}; '
            f'give @continue, which trains a new classifier'
        )
    weights: dict[str, Any] = dict(pretrained=False)
    if load and not shapes_only:
        assert source is not None
        weights = dict(
            pretrained=True,
            pretrained_cfg_overlay=dict(
                state_dict=dict(source.state_dict), num_classes=source.num_classes, label_offset=0, custom_load=False
            ),
        )
    options = dict(spec.options)
    if 'num_classes' in options:
        raise UserError(f'{spec}: num_classes is that of the data; leave it out')
    ours = spec.name.partition('.')[0]
    if shapes_only and ours in catalog.names():  # the first thing that is done with a model
        check_options(ours, options, given_by=printable(spec))
    try:
        with torch.device('meta') if shapes_only else nullcontext():
            model = timm.create_model(spec.name, num_classes=num_classes, **weights, **options)
    except Exception as e:  # a wrong option shows as anything
        how = f' from the weights of --init, of {source.architecture}' if load and source is not None else ''
        raise UserError(f'{spec} cannot be built{how}: {why_not_built(spec.name, e)[:300]}') from None
    if load and not shapes_only:
        assert source is not None
        _check_loaded(spec, model, source)
    if spec.start == 'add_attention':
        import timm_senetv2

        given = {k: v for k, v in spec.start_options if k in ('reduction', 'cardinality')}
        try:
            model = timm_senetv2.add_attention(model, **given)
        except ValueError as e:
            raise UserError(f'{spec}: {one_line(e)}') from None
    if load and not shapes_only and 'fresh_init' in dict(spec.start_options):
        initialize_fresh(model, fresh_units(model, source), dict(spec.start_options)['fresh_init'])
    return model


def _check_loaded(spec: ModelSpec, model: nn.Module, source: Source) -> None:
    """Raise a UserError unless all weights but a new classifier's come from the source, in the way the spec says."""
    state = model.state_dict()
    head = set() if model.num_classes == source.num_classes else set(_head_names(model))
    for key, tensor in state.items():
        given = source.state_dict.get(key)
        if key in head:
            continue
        if given is not None and torch.equal(given, tensor.cpu()):
            continue
        if spec.start == 'lift' and any(key.startswith(f'{name}.') for name, _ in attention(model)):
            continue
        raise UserError(
            f'{spec}: {source.architecture}, the model of --init, has '
            + (f'no {key}' if given is None else f'{key} of shape {tuple(given.shape)}, not {tuple(tensor.shape)}')
            + '; give the same model and options that the weights were trained with'
        )
    unused = source.state_dict.keys() - state.keys()
    if spec.start != 'lift' and unused:
        raise UserError(f'{spec} has no {min(unused)}, which --init has; give the same model and options')
    if spec.start == 'lift' and not fresh_units(model, source):
        raise UserError(f'{spec}: it has no more hidden units than --init; there is nothing to lift; give @continue')


def _head_names(model: nn.Module) -> Iterator[str]:
    classifier = getattr(model, 'pretrained_cfg', {}).get('classifier') or ()
    for name in (classifier,) if isinstance(classifier, str) else classifier:
        yield from (f'{name}.weight', f'{name}.bias')


def attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ATTENTION))


def fresh_units(model: nn.Module, source: Source | None) -> dict[str, int]:
    """How many hidden units of each SaE layer come from the source's SE, the others being fresh; by the layer's name.

    Only layers that have fresh units are listed.
    """
    if source is None:
        return {}
    fresh = {}
    for name, layer in model.named_modules():
        given = source.state_dict.get(f'{name}.fc1.weight')
        if isinstance(layer, SqueezeAggregatedExcitation) and given is not None:
            if given.shape[0] < layer.fc1.out_features:
                fresh[name] = given.shape[0]
    return fresh


@torch.no_grad()
def initialize_fresh(model: nn.Module, fresh: dict[str, int], how: str) -> None:
    """Start fresh hidden units otherwise than a lift does: that leaves nn.Linear's rows of fc1 and zero columns of fc2.

    Args:
        model: Lifted.
        fresh: How many hidden units of each layer come from the source.
        how: 'kaiming': their rows of fc1 normal, with variance 2 / channels, their biases zero. 'small': their columns
            of fc2 normal, with a tenth of the source's standard deviation there, which changes the logits. 'copy':
            their rows of fc1 those of the source, in turn, plus a tenth of nn.Linear's, since equal units would stay
            equal; biases likewise.
    """
    for name, known in fresh.items():
        layer: Any = model.get_submodule(name)
        rows, columns = layer.fc1.weight[known:], layer.fc2.weight[:, known:]
        biases = layer.fc1.bias
        if how == 'kaiming':
            nn.init.kaiming_normal_(rows, nonlinearity='relu')
            if biases is not None:
                biases[known:] = 0
        elif how == 'small':
            nn.init.normal_(columns, std=0.1 * layer.fc2.weight[:, :known].std().item())
        elif how == 'copy':
            for tensor in (layer.fc1.weight, biases):
                if tensor is not None:
                    turns = torch.arange(len(tensor) - known, device=tensor.device) % known
                    tensor[known:] = tensor[turns] + 0.1 * tensor[known:]
        else:
            raise ValueError(f'how must be kaiming, small or copy, got {how!r}')


def freeze_all_but_attention(model: nn.Module, source: Source | None) -> None:
    """Let only the attention train, and a classifier that is new. Frozen norms keep their statistics.

    Raises:
        ValueError: There is no attention.
    """
    trained = {f'{name}.{key}' for name, layer in attention(model) for key, _ in layer.named_parameters()}
    if not trained:
        raise ValueError('it has no attention to train')
    if source is None or model.num_classes != source.num_classes:
        trained.update(_head_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def set_training(model: nn.Module) -> None:
    """Training mode; norms that are frozen, for want of a parameter that trains, stay in evaluation mode."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()


class FreshUnits:
    """Trains fresh hidden units at a multiple of the learning rate.

    They are rows and columns of the tensors of units that were there before, and an optimizer's groups hold whole
    tensors; so the step that the optimizer made is stretched there, which is the same for an optimizer whose step is
    proportional to the learning rate.
    """

    def __init__(self, model: nn.Module, fresh: dict[str, int], factor: float) -> None:
        self.factor = factor
        self.parts = []
        for name, known in fresh.items():
            layer: Any = model.get_submodule(name)
            self.parts += [layer.fc1.weight[known:], layer.fc2.weight[:, known:]]
            if layer.fc1.bias is not None:
                self.parts.append(layer.fc1.bias[known:])
        self.parts = [part.detach() for part in self.parts]  # views of the parameters
        self.before: list[torch.Tensor] = []

    @torch.no_grad()
    def before_step(self, *_: Any) -> None:
        self.before = [part.clone() for part in self.parts]

    @torch.no_grad()
    def after_step(self, *_: Any) -> None:
        for part, before in zip(self.parts, self.before, strict=True):
            part.copy_(torch.lerp(before, part, self.factor))


def save(model: nn.Module, folder: Path, classes: tuple[str, ...], data_config: dict[str, Any]) -> None:
    """Write model.safetensors and config.json, from which timm rebuilds the model: preprocessing and labels too.

    A model with attention added is of no name in timm: build it and add the attention again before loading the weights.
    """
    save_weights(
        model.to(memory_format=torch.contiguous_format),
        folder,
        model_config=dict(label_names=list(classes), pretrained_cfg=dict(tag='trained', license=None)),
        data_config=data_config,
    )
