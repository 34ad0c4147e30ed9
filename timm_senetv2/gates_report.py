"""A folder about the gates of a model: what was found in sentences (report.md), pictures, and the numbers as CSV."""

import csv
import json
import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import __version__
from .catalog import classes_of, config_of
from .create import pretrained
from .errors import UserError, one_line, printable
from .files import check_output, output_folder
from .gates import BIN, CONSTANT, LOWEST, NEAR, Effect, LayerGates, Measurement, attention_layers, measure
from .gates_plots import COLOURS, short_names, write_overlays, write_pictures
from .images import LabelledImages, open_images, outputs_of

_DRAWN_CLASSES = 5  # as in the paper: four classes and all


def write_report(
    model: str,
    data: Path,
    out: Path,
    dataset: str = '',
    dataset_download: bool = False,
    split: str = 'validation',
    images: int = 1000,
    effect_images: int | None = None,
    classes: Sequence[str] = (),
    overlay: int = 0,
    img_size: int | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str = 'cpu',
) -> str:
    """Measure a model's gates on images and write the folder `out`; see `timm-senetv2 gates --help`.

    Returns:
        The report, in Markdown.

    Raises:
        UserError: What the user can mend; nothing is written then.
    """
    for name, value, least in (
        ('--images', images, 2),
        ('--effect-images', effect_images, 0),
        ('--overlay', overlay, 0),
        ('--img-size', img_size, 1),
        ('--batch-size', batch_size, 1),
        ('--workers', workers, 0),
    ):
        if value is not None and value < least:
            raise UserError(f'{name} must be {least} or more, got {value}')
    if len(classes) > len(COLOURS):
        raise UserError(f'--classes takes at most {len(COLOURS)} classes, got {len(classes)}')
    check_output(out, 'gates')
    network = pretrained(model)
    try:
        layers = attention_layers(network)
    except ValueError as e:
        raise UserError(f'{printable(model)}: {one_line(e)}') from None
    pictures = open_images(data, dataset, split, dataset_download, images, classes)
    shown = _shown(classes, pictures)
    config = resolve_data_config({} if img_size is None else {'img_size': img_size}, model=network)
    if config['input_size'][0] != 3:
        raise UserError(
            f'{printable(model)} takes images of {config["input_size"][0]} channels; gates reads RGB images'
        )
    pictures.transform = create_transform(**config, is_training=False)
    outputs, how = outputs_of(network, pictures)

    loader = DataLoader(pictures, batch_size, num_workers=workers if len(pictures) > 200 else 0)
    try:
        network = network.to(device)
        measured = measure(network, loader, pictures.classes, outputs, effect_images, progress=_progress)
    except (RuntimeError, ValueError, AssertionError) as e:  # among them: no such device, no memory left
        raise UserError(f'{printable(model)}: {one_line(e)}') from None

    title = f'{model} on {pictures.name}'
    settings = _settings(model, pictures, measured, img_size=config['input_size'][-1], device=device, split=split)
    with output_folder(out, 'gates') as folder:
        _write_tables(folder, measured, shown)
        drawn = write_pictures(folder, measured, title, shown)
        if overlay:
            drawn += _write_overlays(folder, network, pictures, measured, overlay, title)
        text = report(measured, title, settings, drawn, how, adds_identity=any(layer.adds_identity for layer in layers))
        (folder / 'report.md').write_text(text, encoding='utf-8')
        (folder / 'settings.json').write_text(json.dumps(settings, indent=1) + '\n', encoding='utf-8')
    return text


def _progress(batches: Iterable[Any], what: str) -> Iterable[Any]:
    return tqdm(batches, desc=what, unit='batch', disable=None, leave=False)


def _shown(names: Sequence[str], images: LabelledImages) -> list[int]:
    """The classes to draw, by their indices among those that are measured."""
    if not names:
        count = min(_DRAWN_CLASSES, len(images.classes))
        return [round(i * (len(images.classes) - 1) / max(1, count - 1)) for i in range(count)]
    return [images.classes.index(name) for name in dict.fromkeys(names)]


def _settings(model: str, images: LabelledImages, measured: Measurement, **more: Any) -> dict[str, Any]:
    effect = measured.all_layers
    return dict(
        model=model,
        data=images.name,
        images=measured.images,
        effect_images=effect.images if effect else 0,
        classes=len(measured.classes),
        classes_of_the_data=len(images.all_classes),
        accuracy=measured.accuracy,
        near=NEAR,
        constant=CONSTANT,
        **more,
        timm_senetv2=__version__,
        timm=timm.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
    )


def _write_overlays(
    folder: Path, model: nn.Module, images: LabelledImages, measured: Measurement, count: int, title: str
) -> list[str]:
    from .overlays import overlays

    number = classes_of(model)
    names = config_of(model).get('label_names') or []
    if len(names) != number:
        mapped = dict(zip(outputs_of(model, images)[0] or [], images.classes, strict=False))
        names = [mapped.get(i, f'output {i}') for i in range(number)]
    few = [(image, images.classes[label]) for image, label in map(images.__getitem__, range(min(count, len(images))))]
    try:
        made = overlays(model, few, {layer.name: layer.mean for layer in measured.layers}, list(names))
    except (RuntimeError, ValueError) as e:
        raise UserError(f'--overlay: no maps can be made for this model: {one_line(e)}') from None
    return write_overlays(folder, made, title)


# ---- numbers for programs


def _write_tables(folder: Path, measured: Measurement, shown: Sequence[int]) -> None:
    layers = measured.layers
    _write_csv(folder / 'layers.csv', [_layer_row(layer) for layer in layers])
    effects = [(layer.name, layer.effect) for layer in layers] + [('(all layers)', measured.all_layers)]
    _write_csv(folder / 'effects.csv', [_effect_row(name, e) for name, e in effects if e is not None])
    _write_csv(
        folder / 'channels.csv',
        [
            dict(layer=layer.name, channel=c, mean=mean, std=std, std_within_class=within, lowest=low, highest=high)
            for layer in layers
            for c, (mean, std, within, low, high) in enumerate(
                zip(*map(_list, (layer.mean, layer.std, layer.std_within, layer.low, layer.high)), strict=True)
            )
        ],
    )
    _write_csv(
        folder / 'classes.csv',
        [
            dict(layer=layer.name, class_name=measured.classes[k], images=int(measured.class_images[k]))
            | dict(channel=c, mean=mean, std=std)
            for layer in layers
            for k in shown
            for c, (mean, std) in enumerate(zip(_list(layer.class_mean[k]), _list(layer.class_std[k]), strict=True))
        ],
    )
    _write_csv(
        folder / 'histogram.csv',
        [
            dict(layer=layer.name, low=round(LOWEST + i * BIN, 4), high=round(LOWEST + (i + 1) * BIN, 4), share=share)
            for layer in layers
            for i, share in enumerate(_list(layer.histogram))
            if share
        ],
    )
    _write_csv(
        folder / 'units.csv',
        [
            dict(layer=layer.name, unit=i, branch=i * layer.branches // len(layer.units.mean), mean=mean, fires=fires)
            for layer in layers
            if layer.units is not None
            for i, (mean, fires) in enumerate(zip(_list(layer.units.mean), _list(layer.units.fires), strict=True))
        ],
    )


def _list(tensor: torch.Tensor) -> list[float]:
    values: list[float] = tensor.tolist()
    return values


def _layer_row(layer: LayerGates) -> dict[str, Any]:
    units = layer.units
    return dict(
        layer=layer.name,
        kind=layer.kind,
        branches=layer.branches,
        channels=len(layer.mean),
        mean=float(layer.mean.mean()),
        median=layer.quantile(0.5),
        std_over_images=_rms(layer.std),
        std_within_class=_rms(layer.std_within),
        std_between_channels=float(layer.mean.std()) if len(layer.mean) > 1 else None,
        variance_between_classes=layer.between_share,
        near_0=layer.near_zero,
        near_1=layer.near_one,
        constant_channels=layer.constant,
        hidden_units=len(units.mean) if units else None,
        never_fire=units.never_fire if units else None,
        correlation_within_branch=units.within if units else None,
        correlation_between_branches=units.between if units else None,
        chance_low=units.chance[0] if units and units.chance else None,
        chance_high=units.chance[1] if units and units.chance else None,
    )


def _effect_row(name: str, effect: Effect) -> dict[str, Any]:
    low, high = effect.interval or (None, None)
    return dict(
        layer=name,
        images=effect.images,
        accuracy=effect.accuracy,
        change=effect.change,
        change_low=low,
        change_high=high,
        predictions_changed=effect.predictions_changed,
        output_change=effect.output_change,
        output_std=effect.output_std,
    )


def _rms(std: torch.Tensor) -> float:
    """The standard deviation of a gate, pooled over channels."""
    return float(std.square().mean().sqrt())


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return '' if math.isnan(value) else f'{value:.6g}'


# ---- sentences for people


def report(
    measured: Measurement,
    title: str,
    settings: dict[str, Any],
    pictures: Sequence[str],
    how: str,
    adds_identity: bool = False,
) -> str:
    """What was found, in Markdown: sentences, a table over the blocks, and the pictures.

    Args:
        measured: By `measure`.
        title: Of the model and its data.
        settings: `classes_of_the_data`, the number of classes, and the versions.
        pictures: Names of the files.
        how: How the right outputs are known, a sentence; see `outputs_of`.
        adds_identity: Whether layers return x + x · s.
    """
    most = settings['classes_of_the_data']
    of_all = f' of {most}' if most != len(measured.classes) else ''
    accuracy = f' The model is right on {measured.accuracy:.2f} % of them.' if measured.accuracy is not None else ''
    identity = ' Here the layer returns x + x · s, so that a gate of 0 leaves a channel as it is.' * adds_identity
    lines = [
        f'# What the attention does: {_markdown(title)}',
        '',
        'A layer of channel attention multiplies each channel by a *gate*, a number that it computes for each image',
        f'from the means of all channels.{identity} Measured on {measured.images:,} images of '
        f'{len(measured.classes)}{of_all} {"class" if most == 1 else "classes"}.{accuracy}',
        '',
        '## Findings',
        '',
        *(f'- {sentence}' for sentence in findings(measured)),
        '',
        '## Block by block',
        '',
        *_table(measured),
        '',
        f'SD: standard deviation, pooled over channels. Near: closer than {NEAR:g}. Constant: a channel whose gate has '
        f'a standard deviation below {CONSTANT:g} over the images. Between classes: share of the variance of a gate '
        'that lies between classes.',
        '',
        '## Pictures',
        '',
        *(f'![{_CAPTIONS[name]}]({name})\n\n{_CAPTIONS[name]}\n' for name in pictures),
        '## What this does not show',
        '',
        *(f'- {sentence}' for sentence in _limits(measured, how)),
        '',
        f'Measured with timm-senetv2 {settings["timm_senetv2"]}, timm {settings["timm"]}, torch {settings["torch"]}. '
        'settings.json has the settings, the CSV files have the numbers.',
    ]
    return '\n'.join(lines) + '\n'


_CAPTIONS = {
    'overview.png': 'All blocks: gates, saturation, variance between classes, effect of mean gates, hidden units.',
    'classes.png': 'Mean gate of each channel, by class. Lines that lie apart are channels that tell classes apart.',
    'within_class.png': 'Gates of each channel within a class: mean and standard deviation over its images.',
    'units.png': 'Correlation of the hidden units of each layer over the images.',
    'overlays.png': 'Class-activation maps with the own gates of each image, and with the mean gates of all images.',
}


def findings(measured: Measurement) -> list[str]:
    """What the numbers say, a sentence or two each."""
    found = [_distribution(measured), _constancy(measured), _class_specificity(measured)]
    found += _effect_sentences(measured)
    found += _unit_sentences(measured)
    return [sentence for sentence in found if sentence]


def _distribution(measured: Measurement) -> str:
    layers, names = measured.layers, short_names(measured.layers)
    width = sum(len(layer.mean) for layer in layers)
    zero, one = (
        sum(share * len(layer.mean) for share, layer in zip(shares, layers, strict=True)) / width
        for shares in ([layer.near_zero for layer in layers], [layer.near_one for layer in layers])
    )
    text = f'Of all gates, {_share(zero)} are near 0 (closer than {NEAR:g}) and {_share(one)} near 1.'
    most = max(range(len(layers)), key=lambda i: layers[i].near_zero + layers[i].near_one)
    if len(layers) > 1 and layers[most].near_zero + layers[most].near_one > 0.001:
        text += (
            f' The most saturated block is `{names[most]}`, with {_share(layers[most].near_zero)} near 0 and '
            f'{_share(layers[most].near_one)} near 1.'
        )
    low = min(range(len(layers)), key=lambda i: layers[i].quantile(0.5))
    high = max(range(len(layers)), key=lambda i: layers[i].quantile(0.5))
    if low != high:
        text += (
            f' The median gate goes from {layers[low].quantile(0.5):.2f} in `{names[low]}` '
            f'to {layers[high].quantile(0.5):.2f} in `{names[high]}`.'
        )
    return text


def _constancy(measured: Measurement) -> str:
    layers, names = measured.layers, short_names(measured.layers)
    constant = [round(layer.constant * len(layer.mean)) for layer in layers]
    total = sum(len(layer.mean) for layer in layers)
    whole = [f'`{names[i]}`' for i, layer in enumerate(layers) if constant[i] == len(layer.mean)]
    text = f'{sum(constant)} of {total} channels have a constant gate: whatever the image, it is nearly the same.'
    if whole:
        text += f' In {_list_of(whole)} that holds for every channel: attention only rescales there.'
    return text


def _class_specificity(measured: Measurement) -> str:
    layers, names = measured.layers, short_names(measured.layers)
    shares = [(i, layer.between_share) for i, layer in enumerate(layers) if layer.between_share is not None]
    if not shares:
        return 'Nothing can be said about differences between classes: that needs two classes, and two images of one.'
    most, least = max(shares, key=lambda s: s[1]), min(shares, key=lambda s: s[1])
    if most[1] == least[1]:
        return f'{_share(most[1])} of the variance of a gate lies between classes, in every block.'
    text = (
        f'{_share(most[1])} of the variance of a gate lies between classes in `{names[most[0]]}`, where it is most, '
        f'and {_share(least[1])} in `{names[least[0]]}`, where it is least; the rest is between images of one class.'
    )
    if len(shares) >= 5:
        rho = _rank_correlation([share for _, share in shares])
        trend = 'more' if rho > 0.6 else 'less' if rho < -0.6 else 'neither clearly more nor clearly less'
        text += (
            f' With depth, gates become {trend} specific to the class '
            f"(Spearman's rank correlation of the share with depth: {rho:+.2f})."
        )
    return text


def _rank_correlation(values: Sequence[float]) -> float:
    """Spearman's, of values, not all of them equal, with their places. Equal ones share the mean of their ranks."""
    given = torch.tensor(values, dtype=torch.float64)
    ranks = (given[:, None] > given).sum(1) + (given[:, None] == given).sum(1) / 2
    pair = torch.stack([ranks, torch.arange(len(values), dtype=torch.float64)])
    return float(torch.corrcoef(pair)[0, 1])


def _effect_sentences(measured: Measurement) -> list[str]:
    names = short_names(measured.layers)
    effects = [(name, layer.effect) for name, layer in zip(names, measured.layers, strict=True)]
    known = [(name, effect) for name, effect in effects if effect is not None]
    together = measured.all_layers
    if not known or together is None:
        return ['What the attention matters for the outputs was not measured.']
    found = []
    if together.change is not None and together.interval is not None:
        low, high = together.interval
        verdict = (
            'so the network needs gates that depend on the image'
            if high < 0
            else 'so nothing is lost'
            if low > 0
            else 'a change that cannot be told from none'
        )
        found.append(
            f'With the gates of all blocks replaced by their means, the same for every image, the accuracy on '
            f'{together.images:,} images changes by {together.change:+.2f} points (95 % interval {low:+.2f} to '
            f'{high:+.2f}), {verdict}; {_share(together.predictions_changed)} of the images get another prediction.'
        )
        clear = [(n, e) for n, e in known if e.interval is not None and (e.interval[0] > 0 or e.interval[1] < 0)]
        if len(known) > 1:
            text = (
                f'Replaced in one block at a time, {len(clear)} of {len(known)} blocks change the accuracy by an '
                f'amount whose 95 % interval leaves out 0; by chance alone, {0.05 * len(known):.1f} would.'
            )
            if clear:
                clear.sort(key=lambda pair: -abs(pair[1].change or 0.0))
                told = [f'`{name}` ({effect.change:+.2f} points)' for name, effect in clear[:5]]
                text += f' {"The strongest are" if len(clear) > 5 else "Here"} {_list_of(told)}.'
            found.append(text)
    else:
        found.append(
            f'With the gates of all blocks replaced by their means, {_share(together.predictions_changed)} of '
            f'{together.images:,} images get another prediction. The accuracy is not known, because the classes of the '
            'images are not those of the model.'
        )
    if len(known) > 1:
        name, effect = max(known, key=lambda pair: pair[1].output_change)
        found.append(
            f'The outputs change most with `{name}`: by {effect.output_change:.2f} on average, '
            f'{_share(effect.output_change / effect.output_std if effect.output_std else None)} of their standard '
            f'deviation over the images; {_share(effect.predictions_changed)} of the predictions change.'
        )
    return found


def _unit_sentences(measured: Measurement) -> list[str]:
    names = short_names(measured.layers)
    units = [(name, layer, layer.units) for name, layer in zip(names, measured.layers, strict=True) if layer.units]
    if not units:
        return ['These layers have no hidden units.']
    dead, total = sum(u.never_fire for _, _, u in units), sum(len(u.mean) for _, _, u in units)
    where = [f'`{name}` ({u.never_fire} of {len(u.mean)})' for name, _, u in units if u.never_fire]
    text = f'{dead} of {total} hidden units never fire: they are 0 for every image.'
    if where:
        text += f' They are in {_list_of(where[:6])}{" and others" * (len(where) > 6)}.'
    found = [text]
    grouped = [(name, u) for name, layer, u in units if layer.branches > 1 and u.chance is not None]
    if grouped:
        apart = [
            f'`{name}` ({u.within - u.between:+.2f})'
            for name, u in grouped
            if u.chance and u.within is not None and u.between is not None
            if not u.chance[0] <= u.within - u.between <= u.chance[1]
        ]
        within = sum(u.within or 0.0 for _, u in grouped) / len(grouped)
        between = sum(u.between or 0.0 for _, u in grouped) / len(grouped)
        text = (
            f'Two hidden units of one branch have a correlation of {within:.2f} in absolute value, two of different '
            f'branches {between:.2f}: means over {len(grouped)} blocks. '
        )
        if apart:
            text += (
                f'In {len(apart)} of these blocks the difference lies outside the range of 95 % of random regroupings '
                f'of the same units: {_list_of(apart)}; by chance, {0.05 * len(grouped):.1f} would.'
            )
        else:
            text += (
                'In none of these blocks does the difference lie outside the range of 95 % of random regroupings of '
                'the same units: the branches are not shown to be anything else than the hidden units of one wide SE.'
            )
        found.append(text)
    single = [u.within for _, layer, u in units if layer.branches == 1 and u.within is not None]
    if single:
        found.append(
            f'Two hidden units of one layer have a correlation of {sum(single) / len(single):.2f} in absolute value: '
            f'a mean over {len(single)} blocks.'
        )
    return found


def _limits(measured: Measurement, how: str) -> list[str]:
    effect = measured.all_layers
    limits = [
        'One trained model was measured. Another seed gives other gates; what is of the architecture and what of this '
        'training cannot be told apart.',
        'Replacing gates by their means asks whether a block has to look at the image. It does not ask whether the '
        'network would have learnt as well without attention: for that, it has to be trained without.',
    ]
    if effect is not None:
        limits.append(
            'The means are those of the same images, which favours the means a little. An interval that holds 0 is no '
            'proof of no effect.'
        )
    if any(layer.branches > 1 for layer in measured.layers):
        limits.append(
            'A correlation says nothing of what hidden units respond to. A branch of one unit has no pairs within.'
        )
    return [*limits, how]


def _table(measured: Measurement) -> list[str]:
    effects, units = any(layer.effect for layer in measured.layers), any(layer.units for layer in measured.layers)
    accuracy = measured.accuracy is not None
    head = ['block', 'kind', 'channels', 'mean gate', 'SD over images', 'SD within a class', 'between classes, %']
    head += ['near 0, %', 'near 1, %', 'constant, %']
    head += ['mean gates: accuracy, points'] * (effects and accuracy) + ['mean gates: other prediction, %'] * effects
    head += ['units that never fire', 'correlation within a branch', 'between branches'] * units
    rows = [head, ['---', '---', *['--:'] * (len(head) - 2)]]
    for name, layer in zip(short_names(measured.layers), measured.layers, strict=True):
        row = [f'`{name}`', f'{layer.kind}, {layer.branches} branches' if layer.branches > 1 else layer.kind]
        row += [str(len(layer.mean)), f'{float(layer.mean.mean()):.3f}']
        row += [_number(_rms(layer.std)), _number(_rms(layer.std_within)), _number(layer.between_share, 1, 100)]
        row += [_number(share, 1, 100) for share in (layer.near_zero, layer.near_one, layer.constant)]
        if effects:
            effect = layer.effect
            if accuracy:
                interval = effect.interval if effect else None
                row.append(
                    f'{effect.change:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]' if effect and interval else ''
                )
            row.append(_number(effect.predictions_changed if effect else None, 1, 100))
        if units:
            u = layer.units
            row += [f'{u.never_fire} of {len(u.mean)}' if u else '']
            row += [_number(u.within if u else None, 2), _number(u.between if u else None, 2)]
        rows.append(row)
    return [f'| {" | ".join(row)} |' for row in rows]


def _number(value: float | None, digits: int = 3, factor: float = 1.0) -> str:
    return '' if value is None or math.isnan(value) else f'{factor * value:.{digits}f}'


def _share(share: float | None) -> str:
    return 'an unknown share' if share is None else f'{100 * share:.1f} %'


def _list_of(parts: Sequence[str]) -> str:
    return ' and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))


def _markdown(text: str) -> str:
    """Text from a file or a command line, as plain text in Markdown."""
    return ''.join(f'\\{c}' if c in '\\`*_[]<>|#!' else c for c in printable(text))
