"""What channel attention does in a trained model, measured on images.

The questions are those of section 6.4 of `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507 - how the
gates are distributed, how they differ between classes and within one, and whether a layer could do without looking at
the image; and one of `SENetV2` - https://arxiv.org/abs/2311.10807 - whether the branches of SaE learn different things.

    measured = measure(model, loader, ('cat', 'dog'))
    for layer in measured.layers:
        print(layer.name, layer.mean.mean(), layer.between_share, layer.effect.change)

A *gate* is the number that a layer multiplies a channel by. Gates are read by forward hooks on the module that puts
them out, so that the model stays what it is. Statistics are streaming and in float64: no gate is kept.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from timm.layers import EcaModule, EffectiveSEModule, SEModule
from timm.models.efficientnet import SqueezeExcite
from timm.models.senet import SEModule as OriginalSEModule
from torch import nn
from torchvision.ops import SqueezeExcitation  # type: ignore[import-untyped]

from .layers import SqueezeAggregatedExcitation
from .profile import evaluating

NEAR = 0.05  # a gate is near 0 or 1 when it is closer than this
CONSTANT = 0.01  # a channel is constant when the standard deviation of its gate over the images is below this
LOWEST, HIGHEST, BIN = -1.0, 2.0, 0.01  # of the histograms: room for gates by sigmoid, hard sigmoid and tanh
REGROUPINGS = 1000  # random regroupings of hidden units into branches

# Each class of layer: what it is called here, the names of the modules that put out gates and hidden units
_PARTS: dict[type[nn.Module], tuple[str, str, str | None]] = {
    SqueezeAggregatedExcitation: ('SaE', 'gate_act', 'act'),
    SEModule: ('SE', 'gate', 'act'),
    SqueezeExcite: ('SE', 'gate', 'act1'),
    OriginalSEModule: ('SE', 'sigmoid', 'relu'),
    SqueezeExcitation: ('SE', 'scale_activation', 'activation'),
    EffectiveSEModule: ('eSE', 'gate', None),
    EcaModule: ('ECA', 'gate', None),
}

Progress = Callable[[Iterable[tuple[torch.Tensor, torch.Tensor]], str], Iterable[tuple[torch.Tensor, torch.Tensor]]]


class Attention(NamedTuple):
    """A layer of channel attention in a model.

    name: Of the layer in the model, such as 'layer1.0.se'.
    kind: 'SaE', 'SE', 'eSE' or 'ECA'. SaE with one branch is SE.
    gate: The module that puts out the gates.
    hidden: The module that puts out the hidden units, or None where there are none.
    branches: Branches of SaE; 1 for the others.
    adds_identity: Whether the layer returns x + x · s in place of x · s.
    """

    name: str
    kind: str
    gate: nn.Module
    hidden: nn.Module | None
    branches: int
    adds_identity: bool


def attention_layers(model: nn.Module) -> list[Attention]:
    """The layers of channel attention in a model: SaE, timm's and torchvision's SE, timm's effective SE and ECA.

    Raises:
        ValueError: It holds none.
    """
    found = []
    for name, module in model.named_modules():
        parts = next((p for cls, p in _PARTS.items() if isinstance(module, cls)), None)
        if parts is None:
            continue
        kind, gate, hidden = parts
        branches = module.cardinality if isinstance(module, SqueezeAggregatedExcitation) else 1
        found.append(
            Attention(
                name=name,
                kind='SE' if kind == 'SaE' and branches == 1 else kind,
                gate=getattr(module, gate),
                hidden=None if hidden is None else getattr(module, hidden),
                branches=branches,
                adds_identity=bool(getattr(module, 'add_identity', False)),
            )
        )
    if not found:
        raise ValueError(f'this {type(model).__name__} has no channel attention (SaE, SE, effective SE or ECA)')
    return found


@dataclass(frozen=True)
class Effect:
    """What becomes of a model's outputs when gates are replaced by their means over the images.

    images: On which it was measured.
    accuracy: Top-1 in % with the means; None where the right outputs are not known.
    change: Points of accuracy that this is above the unchanged model.
    interval: A 95 % interval of `change`, paired by image: Agresti and Min, "Simple improved confidence intervals for
        comparing matched proportions", 2005.
    predictions_changed: Share of images for which another output is the largest.
    output_change: Mean absolute change of an output (a logit), over images and outputs.
    output_std: Standard deviation of an output over the images, as the model is: a scale for `output_change`.
    """

    images: int
    accuracy: float | None
    change: float | None
    interval: tuple[float, float] | None
    predictions_changed: float
    output_change: float
    output_std: float


@dataclass(frozen=True)
class Units:
    """The hidden units of a layer: fc1's, after the activation.

    mean: (H,), over images.
    fires: (H,), share of images in which the unit is not 0.
    correlation: (H, H), Pearson's over images; nan for a unit that is the same in all images.
    within: Mean absolute correlation of two units of one branch; in a layer without branches, of any two. None where
        there are no two such units that vary.
    between: The same of two units of different branches.
    chance: The range of `within - between` that 95 % of random regroupings of the units into branches have.
    """

    mean: torch.Tensor
    fires: torch.Tensor
    correlation: torch.Tensor
    within: float | None
    between: float | None
    chance: tuple[float, float] | None

    @property
    def never_fire(self) -> int:
        """Units that are 0 in every image, and could be taken away."""
        return int((self.fires == 0).sum())


@dataclass(frozen=True)
class LayerGates:
    """The gates of one layer of C channels, over all images; K classes. Tensors are float64.

    name, kind, branches, adds_identity: See `Attention`.
    mean, std, low, high: (C,), of each channel's gate over the images; the standard deviation with n - 1.
    std_within: (C,), standard deviation within a class, pooled over classes; nan where no class has two images.
    class_mean: (K, C); nan for a class without images.
    class_std: (K, C); nan for a class with fewer than two images.
    between_share: Share of the variance of a gate that lies between classes, pooled over channels: analysis of
        variance with the classes as random effect, so that few images a class do not raise it. None with one class, or
        where no class has two images, or where no gate varies.
    near_zero, near_one: Share of gates, over images and channels, closer than NEAR to 0 and 1.
    constant: Share of channels whose gate has a standard deviation below CONSTANT.
    histogram: Shares of the gates in bins of width BIN from LOWEST to HIGHEST; the first and last take what lies
        beyond. A gate of exactly 1 counts into the bin below.
    units: None for a layer without hidden units.
    effect: None where it was not measured.
    """

    name: str
    kind: str
    branches: int
    adds_identity: bool
    mean: torch.Tensor
    std: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    std_within: torch.Tensor
    class_mean: torch.Tensor
    class_std: torch.Tensor
    between_share: float | None
    near_zero: float
    near_one: float
    constant: float
    histogram: torch.Tensor
    units: Units | None
    effect: Effect | None = None

    def quantile(self, share: float) -> float:
        """The gate below which this share of the layer's gates lies, from the histogram."""
        below = self.histogram.cumsum(0)
        i = min(int(torch.searchsorted(below, share)), len(below) - 1)
        before = float(below[i - 1]) if i else 0.0
        part = (share - before) / float(self.histogram[i]) if self.histogram[i] > 0 else 0.0
        return LOWEST + BIN * (i + min(max(part, 0.0), 1.0))


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    classes: Names of the K classes.
    class_images: (K,), images measured of each.
    accuracy: Top-1 in % on these images; None where the right outputs are not known.
    layers: In the order in which the model calls them.
    all_layers: The effect of replacing the gates of all layers at once; None where it was not measured.
    """

    classes: tuple[str, ...]
    class_images: torch.Tensor
    accuracy: float | None
    layers: tuple[LayerGates, ...]
    all_layers: Effect | None

    @property
    def images(self) -> int:
        return int(self.class_images.sum())


# ---- streaming statistics


class _ClassMoments:
    """Count, mean and sum of squared deviations of (N, W) values by class, by the merge of Chan, Golub and LeVeque."""

    def __init__(self, classes: int, width: int) -> None:
        self.count = torch.zeros(classes, dtype=torch.float64)
        self.mean = torch.zeros(classes, width, dtype=torch.float64)
        self.m2 = torch.zeros(classes, width, dtype=torch.float64)

    def update(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        present, index = labels.unique(return_inverse=True)
        count = torch.bincount(index).double()
        zeros = values.new_zeros(len(present), values.shape[1])
        mean = zeros.index_add(0, index, values) / count[:, None]
        m2 = zeros.index_add(0, index, (values - mean[index]).square())
        before = self.count[present]
        total = before + count
        delta = mean - self.mean[present]
        self.mean[present] += delta * (count / total)[:, None]
        self.m2[present] += m2 + delta.square() * (before * count / total)[:, None]
        self.count[present] = total

    def overall(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and sum of squared deviations from it of all values: (W,) each."""
        weight = self.count[:, None]
        mean = (weight * self.mean).sum(0) / self.count.sum()
        return mean, (self.m2 + weight * (self.mean - mean).square()).sum(0)


class _Gates:
    """The statistics of one layer's gates."""

    def __init__(self, classes: int, channels: int) -> None:
        self.moments = _ClassMoments(classes, channels)
        self.low = torch.full((channels,), math.inf, dtype=torch.float64)
        self.high = torch.full((channels,), -math.inf, dtype=torch.float64)
        self.near = torch.zeros(2, dtype=torch.float64)
        self.bins = torch.zeros(round((HIGHEST - LOWEST) / BIN), dtype=torch.float64)

    def update(self, gates: torch.Tensor, labels: torch.Tensor) -> None:
        self.moments.update(gates, labels)
        self.low = torch.minimum(self.low, gates.amin(0))
        self.high = torch.maximum(self.high, gates.amax(0))
        self.near += torch.stack([(gates.abs() < NEAR).sum(), ((gates - 1).abs() < NEAR).sum()])
        placed = torch.where(gates == 1, 1 - BIN / 2, gates)
        index = ((placed - LOWEST) / BIN).floor().clamp(0, len(self.bins) - 1).long()
        self.bins += torch.bincount(index.flatten(), minlength=len(self.bins))

    def summary(self, layer: Attention, units: '_Units | None') -> LayerGates:
        moments, count = self.moments, self.moments.count
        images = float(count.sum())
        mean, m2 = moments.overall()
        within = moments.m2.sum(0) / (images - float((count > 0).sum()))  # 0 / 0 with one image a class
        few = count[:, None] < 2
        std = (m2 / (images - 1)).sqrt()
        return LayerGates(
            name=layer.name,
            kind=layer.kind,
            branches=layer.branches,
            adds_identity=layer.adds_identity,
            mean=mean,
            std=std,
            low=self.low,
            high=self.high,
            std_within=within.sqrt(),
            class_mean=moments.mean.masked_fill(count[:, None] == 0, math.nan),
            class_std=(moments.m2 / (count[:, None] - 1).clamp(min=1)).sqrt().masked_fill(few, math.nan),
            between_share=_between_share(count, m2, within),
            near_zero=float(self.near[0]) / (images * len(mean)),
            near_one=float(self.near[1]) / (images * len(mean)),
            constant=float((std < CONSTANT).double().mean()),
            histogram=self.bins / self.bins.sum(),
            units=units.summary(layer.branches) if units is not None else None,
        )


def _between_share(count: torch.Tensor, m2: torch.Tensor, within: torch.Tensor) -> float | None:
    """Share of variance between classes: one-way analysis of variance, classes as random effect.

    Args:
        count: (K,), images of each class.
        m2: (C,), sum of squared deviations from the mean of all.
        within: (C,), variance within classes.
    """
    images, classes = float(count.sum()), int((count > 0).sum())
    if classes < 2 or images <= classes:
        return None
    typical = (images - float(count.square().sum()) / images) / (classes - 1)  # images a class, if all had as many
    mean_square = (m2 - within * (images - classes)) / (classes - 1)
    between = float((mean_square - within).sum()) / typical
    total = between + float(within.sum())
    return max(0.0, between / total) if total > 0 else None


class _Units:
    """Means, covariance and firing of the hidden units of one layer."""

    def __init__(self, units: int) -> None:
        self.count = 0
        self.mean = torch.zeros(units, dtype=torch.float64)
        self.m2 = torch.zeros(units, units, dtype=torch.float64)
        self.fired = torch.zeros(units, dtype=torch.float64)
        self.low = torch.full((units,), math.inf, dtype=torch.float64)
        self.high = torch.full((units,), -math.inf, dtype=torch.float64)

    def update(self, values: torch.Tensor) -> None:
        count, total = len(values), self.count + len(values)
        mean = values.mean(0)
        centred, delta = values - mean, mean - self.mean
        self.m2 += centred.T @ centred + torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.fired += (values != 0).sum(0)  # SiLU and the like work below 0 too
        self.low = torch.minimum(self.low, values.amin(0))
        self.high = torch.maximum(self.high, values.amax(0))
        self.count = total

    def summary(self, branches: int) -> Units:
        varies = self.low < self.high
        scale = self.m2.diagonal().sqrt().masked_fill(~varies, math.nan)
        correlation = (self.m2 / torch.outer(scale, scale)).clamp(-1, 1)
        return Units(self.mean, self.fired / self.count, correlation, *_branch_correlation(correlation, branches))


def _branch_correlation(
    correlation: torch.Tensor, branches: int
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Mean absolute correlation within and between branches, and the range of their difference by chance."""
    units = len(correlation)
    kept = ~correlation.diagonal().isnan()
    strength = correlation[kept][:, kept].abs()
    branch = (torch.arange(units) // (units // branches))[kept]
    first, second = torch.triu_indices(len(strength), len(strength), offset=1)
    same = branch[first] == branch[second]
    pairs = strength[first, second]
    within = float(pairs[same].mean()) if same.any() else None
    between = float(pairs[~same].mean()) if (~same).any() else None
    if within is None or between is None:
        return within, between, None
    generator = torch.Generator().manual_seed(0)
    differences = torch.empty(REGROUPINGS, dtype=torch.float64)
    inside, rest = int(same.sum()), int((~same).sum())
    everything = pairs.sum()
    for i in range(REGROUPINGS):
        order = torch.randperm(len(strength), generator=generator)
        chosen = strength[order[first[same]], order[second[same]]].sum()
        differences[i] = chosen / inside - (everything - chosen) / rest
    low, high = differences.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return within, between, (low, high)


# ---- reading and replacing gates


@contextlib.contextmanager
def replaced_gates(layers: Iterable[Attention], gates: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While the block runs, each of these layers uses the gates given for its name, (C,), for every image.

    Raises:
        KeyError: A layer whose name is not in `gates`.
    """

    def hook_for(given: torch.Tensor) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            return given.to(output).view(1, *output.shape[1:]).expand_as(output)

        return hook

    with contextlib.ExitStack() as stack:
        for layer in layers:
            handle = layer.gate.register_forward_hook(hook_for(gates[layer.name]))
            stack.callback(handle.remove)
        yield


class _Reader:
    """Hooks that update the statistics of every layer with each batch."""

    def __init__(self, layers: Sequence[Attention], classes: int) -> None:
        self.layers, self.classes = layers, classes
        self.gates: dict[str, _Gates] = {}  # in the order of the calls
        self.units: dict[str, _Units] = {}
        self.labels = torch.empty(0, dtype=torch.long)
        self._called: set[str] = set()

    def begin(self, labels: torch.Tensor) -> None:
        """The labels, (N,), of the images that the model is given next."""
        self.labels = labels.cpu()
        self._called.clear()

    def __enter__(self) -> '_Reader':
        self._stack = contextlib.ExitStack()
        for layer in self.layers:
            for module, read in ((layer.gate, self._read_gates), (layer.hidden, self._read_units)):
                if module is not None:
                    handle = module.register_forward_hook(_bind(read, layer))
                    self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _read_gates(self, layer: Attention, output: torch.Tensor) -> None:
        if layer.name in self._called:
            raise ValueError(f'{layer.name} is called twice for an image, and has no one gate for it')
        self._called.add(layer.name)
        gates = self._rows(layer, output)
        if layer.name not in self.gates:
            self.gates[layer.name] = _Gates(self.classes, gates.shape[1])
        self.gates[layer.name].update(gates, self.labels)

    def _read_units(self, layer: Attention, output: torch.Tensor) -> None:
        values = self._rows(layer, output)
        if layer.name not in self.units:
            self.units[layer.name] = _Units(values.shape[1])
        self.units[layer.name].update(values)

    def _rows(self, layer: Attention, output: torch.Tensor) -> torch.Tensor:
        """(N, C) in float64 from what a layer puts out, which is (N, C), (N, C, 1, 1) or (N, 1, C)."""
        if len(output) != len(self.labels) or output.numel() != len(output) * max(output.shape[1:]):
            raise ValueError(
                f'{layer.name} has gates of shape {tuple(output.shape)} for {len(self.labels)} images, '
                'and not one for each image and channel'
            )
        rows = output.detach().flatten(1).double().cpu()
        if not rows.isfinite().all():
            image = int((~rows.isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f'{layer.name} has gates or hidden units that are not finite (image {image + 1} of a batch); '
                'see to the weights of the model and the values of the images'
            )
        return rows


def _bind(
    read: Callable[[Attention, torch.Tensor], None], layer: Attention
) -> Callable[[nn.Module, object, torch.Tensor], None]:
    return lambda _module, _inputs, output: read(layer, output)


# ---- the measurement


def measure(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: Sequence[str],
    outputs: Sequence[int] | None = None,
    effect_images: int | None = None,
    progress: Progress = lambda batches, what: batches,
) -> Measurement:
    """Measure the gates of a model on images, and what they matter for its outputs.

    The images are gone through twice: for the statistics, and for the effects, which need the means. The second time,
    the model runs once for each layer and twice more. Memory: 16 bytes for each class and channel of each layer, and 8
    for each pair of hidden units of a layer.

    Args:
        model: Any model with layers that `attention_layers` finds; it may be of timm, of torchvision, or lifted. It
            takes (N, 3, H, W) and puts out (N, outputs). Unchanged afterwards.
        loader: Batches of images, as the model takes them, and of class indices, (N,). It is iterated twice and must
            give the same images; in an order that mixes the classes where `effect_images` is given.
        classes: Names of the classes, by index.
        outputs: The model's output for each class, to know accuracies. None: accuracies are None.
        effect_images: Images on which effects are measured, the first of the loader. None: all; 0: none.
        progress: Wraps the loader of each of the two rounds, given with a word on what is done; such as tqdm.

    Raises:
        ValueError: A model without attention, or whose layers do not give one gate for each image and channel, such as
            one that is called twice in a pass; fewer than two images; class indices or outputs out of range; outputs or
            gates that are not finite.
    """
    layers = attention_layers(model)
    if outputs is not None and len(outputs) != len(classes):
        raise ValueError(f'outputs must be one for each of the {len(classes)} classes, got {len(outputs)}')
    right = None if outputs is None else torch.tensor(list(outputs), dtype=torch.long)

    with evaluating(model):
        reader, correct = _Reader(layers, len(classes)), 0
        with reader:
            for images, labels in progress(loader, 'gates'):
                if not len(labels):
                    continue
                _check_labels(labels, len(classes))
                reader.begin(labels)
                out = _outputs(model, images)
                if right is not None:
                    _check_outputs(right, out)
                    correct += int((out.argmax(1) == right[reader.labels]).sum())
        called = {layer.name: layer for layer in layers}
        ordered = [called[name] for name in reader.gates]
        if not ordered:
            raise ValueError('the loader gives no images' if not reader.labels.numel() else 'no layer was called')
        counts = next(iter(reader.gates.values())).moments.count
        total = int(counts.sum())
        if total < 2:
            raise ValueError('one image says nothing of how gates vary from image to image; give two or more')
        measured = [reader.gates[layer.name].summary(layer, reader.units.get(layer.name)) for layer in ordered]

        together = None
        if effect_images is None or effect_images > 0:
            means = {layer.name: layer.mean for layer in measured}
            variants = [[layer] for layer in ordered] + [ordered]
            limit = total if effect_images is None else min(effect_images, total)
            *single, together = _effects(model, progress(loader, 'effects'), variants, means, right, limit)
            measured = [replace(layer, effect=effect) for layer, effect in zip(measured, single, strict=True)]
    return Measurement(
        classes=tuple(classes),
        class_images=counts,
        accuracy=None if right is None else 100 * correct / total,
        layers=tuple(measured),
        all_layers=together,
    )


def _outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The model's outputs, (N, outputs), in float64 on the CPU."""
    weight = next(model.parameters())
    out = model(images.to(weight))
    if not isinstance(out, torch.Tensor) or out.ndim != 2:
        shown = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f'the model must put out (images, classes), got {shown}')
    out = out.double().cpu()
    if not out.isfinite().all():
        raise ValueError('the model puts out numbers that are not finite; see to its weights')
    return out


def _check_labels(labels: torch.Tensor, classes: int) -> None:
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f'class indices must be from 0 to {classes - 1}, got {labels.min()} to {labels.max()}')


def _check_outputs(right: torch.Tensor, out: torch.Tensor) -> None:
    if not 0 <= int(right.min()) <= int(right.max()) < out.shape[1]:
        raise ValueError(f'outputs must be from 0 to {out.shape[1] - 1}, got {right.min()} to {right.max()}')


class _Tally:
    """One variant of the model beside the model as it is."""

    def __init__(self) -> None:
        self.moved = self.gained = self.lost = self.correct = 0
        self.difference = 0.0

    def update(self, out: torch.Tensor, plain: torch.Tensor, target: torch.Tensor | None) -> None:
        self.difference += float((out - plain).abs().mean(1).sum())
        now, before = out.argmax(1), plain.argmax(1)
        self.moved += int((now != before).sum())
        if target is not None:
            self.correct += int((now == target).sum())
            self.gained += int(((now == target) & (before != target)).sum())
            self.lost += int(((now != target) & (before == target)).sum())


def _effects(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    variants: Sequence[Sequence[Attention]],
    means: Mapping[str, torch.Tensor],
    right: torch.Tensor | None,
    limit: int,
) -> list[Effect]:
    tallies = [_Tally() for _ in variants]
    scale: _ClassMoments | None = None
    seen = 0
    for batch, classes in loader:
        if not len(classes):
            continue
        images, labels = batch[: limit - seen], classes[: limit - seen].cpu()
        target = None if right is None else right[labels]
        plain = _outputs(model, images)
        scale = scale or _ClassMoments(1, plain.shape[1])
        scale.update(plain, torch.zeros_like(labels))
        for layers, tally in zip(variants, tallies, strict=True):
            with replaced_gates(layers, means):
                tally.update(_outputs(model, images), plain, target)
        seen += len(images)
        if seen >= limit:
            break
    assert scale is not None
    output_std = float((scale.overall()[1] / max(1, seen - 1)).sqrt().mean())
    return [_effect(tally, seen, output_std, right is not None) for tally in tallies]


def _effect(tally: _Tally, images: int, output_std: float, knows_right: bool) -> Effect:
    return Effect(
        images=images,
        accuracy=100 * tally.correct / images if knows_right else None,
        change=100 * (tally.gained - tally.lost) / images if knows_right else None,
        interval=_paired_interval(tally.gained, tally.lost, images) if knows_right else None,
        predictions_changed=tally.moved / images,
        output_change=tally.difference / images,
        output_std=output_std,
    )


def _paired_interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """95 % interval, in points, of the change when some images were gained and others lost; never of width 0."""
    up, down, n = gained + 0.5, lost + 0.5, images + 2
    middle = (up - down) / n
    half = 1.959964 * math.sqrt(up + down - (up - down) ** 2 / n) / n
    return 100 * max(-1.0, middle - half), 100 * min(1.0, middle + half)
