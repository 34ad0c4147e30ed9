"""The quickstart: train small models with reproduce.py's loop, save them, load one again, and draw what it sees."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from tqdm import tqdm

import timm_senetv2  # noqa: F401  the models are there even with torch's autoload off
from timm_senetv2.errors import UserError, did_you_mean, one_line, printable
from timm_senetv2.files import MARK, check_output, output_folder

from .batches import Batches
from .data import ImageData, load_dataset
from .files import write_csv
from .grid import profile
from .plots import Curve, pick, plot_quickstart
from .settings import Settings, make_settings, parse_specs
from .training import History, train
from .warm_start import save

TOOL = 'quickstart.py'
SHOWN = 'cifar_senetv2_resnet20'  # in the picture, if it is among the models
PICTURE = 'quickstart.png'
CSV_COLUMNS = ('model', 'parameters', 'epoch', 'train_loss', 'test_loss', 'test_accuracy')
COLUMNS = ('model', 'parameters', 'test loss', 'test accuracy', 'seconds')


@dataclass(frozen=True)
class Trained:
    """What is left of a training."""

    name: str
    parameters: int
    history: History
    predicted: torch.Tensor  # class of each test image


def quickstart(
    models: Sequence[str],
    epochs: int,
    seed: int,
    dataset: str,
    data_dir: str | None,
    out: Path,
) -> None:
    """Train each model from scratch, save it to a folder in `out`, and say and draw how it went.

    Raises:
        UserError: A mistake on the command line, images or a disk that fail; `out` is what it was then.
    """
    for name in models:
        if not timm.is_model(name):
            known = timm.list_models()
            raise UserError(
                f'unknown model {name!r}{did_you_mean(name, known) or "; timm.list_models() has all names"}'
            )
    check_output(out, TOOL)
    settings = _settings(epochs, seed, dataset)
    data = load_dataset(dataset, data_dir)
    batches = Batches(data, settings, workers=min(4, os.cpu_count() or 1))
    specs = {name: parse_specs(name)[0] for name in models}
    costs = {name: profile(spec, batches) for name, spec in specs.items()}
    shown = SHOWN if SHOWN in models else models[-1]
    print(
        f'{printable(data.name)}: {len(data.train)} images to train on, {len(data.test)} held out, '
        f'{len(data.classes)} classes; epochs: {epochs}, on {settings.device}'
    )
    trained = []
    with output_folder(out, TOOL) as folder, _half_the_cores(settings.device):
        for name in models:
            model, history = _train(name, seed, settings, batches)
            print(
                f'{name}: {history[-1]["accuracy"]:.2f} % of the held-out images after '
                f'{sum(row["seconds"] for row in history):.0f} s',
                flush=True,
            )
            trained.append(Trained(name, costs[name].params, history, _predict(model, batches).argmax(1)))
            save(model, folder / name, data.classes, batches.data_config(model))
        write_csv(
            folder / 'results.csv',
            CSV_COLUMNS,
            [
                dict(
                    model=t.name,
                    parameters=t.parameters,
                    epoch=int(row['epoch']) + 1,
                    train_loss=f'{row["train_loss"]:.6g}',
                    test_loss=f'{row["test_loss"]:.6g}',
                    test_accuracy=f'{row["accuracy"]:.6g}',
                )
                for t in trained
                for row in t.history
            ],
        )

    # from here on as anybody would who was given the folder
    loaded = timm.create_model(f'local-dir:{out / shown}', pretrained=True)
    configs = [batches.data_config(loaded), timm.data.resolve_model_data_config(loaded)]
    if len({json.dumps(config, sort_keys=True) for config in configs}) > 1:
        raise RuntimeError(f'{shown} was saved with another preprocessing than it was trained with')
    with _half_the_cores(settings.device):
        probabilities = _predict(loaded.to(settings.device), batches)
    (before,) = (t.predicted for t in trained if t.name == shown)
    if not torch.equal(probabilities.argmax(1), before):
        raise RuntimeError(f'{shown} predicts otherwise after saving and loading')
    picked = pick(data.test.targets, probabilities)
    has_picture = _add_picture(out, trained, data, shown, probabilities, picked)
    _say(out, trained, data, shown, probabilities, [*picked[0][:5], *picked[1][:5]], has_picture)


@contextmanager
def _half_the_cores(device: str) -> Iterator[None]:
    """On all cores, each step of these small models would wait for the one core that something else runs on."""
    before = torch.get_num_threads()
    if device == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _settings(epochs: int, seed: int, dataset: str) -> Settings:
    """What reproduce.py has with --protocol modern --batch-size 64 --channels-last."""
    return make_settings(
        dict(dataset=dataset, protocol='modern', epochs=epochs, batch_size=64, channels_last=True, seeds=[seed])
    )


def _train(name: str, seed: int, settings: Settings, batches: Batches) -> tuple[torch.nn.Module, History]:
    (spec,) = parse_specs(name)
    with tqdm(
        total=settings.epochs,
        desc=name,
        unit='epoch',
        bar_format='{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}]{postfix}',
        leave=False,
        disable=None,
    ) as bar:

        def progress(done: float, history: History) -> None:
            if history:
                bar.set_postfix_str(f'held out {history[-1]["accuracy"]:.1f} %', refresh=False)
            bar.update(done - bar.n)

        return train(spec, seed, settings, batches, progress=progress)


@torch.inference_mode()
def _predict(model: torch.nn.Module, batches: Batches) -> torch.Tensor:
    """Class probabilities of the test images, (images, classes), on the CPU."""
    _, test = batches.of(model)
    model.eval()
    return torch.cat([model(images).softmax(1).float().cpu() for images, _ in test.batches(0)])


def _add_picture(
    out: Path,
    trained: Sequence[Trained],
    data: ImageData,
    shown: str,
    probabilities: torch.Tensor,
    picked: Sequence[Sequence[int]],
) -> bool:
    """Draw, and put the picture into the finished folder; what goes wrong here costs the picture only."""
    curves = [
        Curve(t.name, [row['train_loss'] for row in t.history], [row['accuracy'] for row in t.history]) for t in trained
    ]
    try:
        picture = plot_quickstart(curves, data, shown, probabilities, picked)
        with output_folder(out, TOOL) as folder:
            shutil.copytree(out, folder, ignore=shutil.ignore_patterns(MARK), dirs_exist_ok=True)
            (folder / PICTURE).write_bytes(picture)
    except Exception as e:
        print(f'warning: {PICTURE} could not be made: {one_line(e)}', file=sys.stderr)
        return False
    return True


def _say(
    out: Path,
    trained: Sequence[Trained],
    data: ImageData,
    shown: str,
    probabilities: torch.Tensor,
    images: Sequence[int],
    has_picture: bool,
) -> None:
    rows = [
        (
            t.name,
            f'{t.parameters:,}',
            f'{t.history[-1]["test_loss"]:.4f}',
            f'{t.history[-1]["accuracy"]:.2f} %',
            f'{sum(row["seconds"] for row in t.history):.0f}',
        )
        for t in trained
    ]
    widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    print()
    for row in (COLUMNS, ['-' * w for w in widths], *rows):
        print('  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    print(f"""
Loss and accuracy are of the held-out images, after the last epoch. {shown} was loaded again from its folder:
    timm.create_model('local-dir:{printable(out / shown)}', pretrained=True)
It predicts the same as before for all {len(data.test)} of them. Some of them, and some it is least sure of:""")
    for index in images:
        confidence, predicted = probabilities[index].max(0)
        print(
            f'    image {index}: {data.classes[int(predicted)]} ({100 * confidence:.1f} %), '
            f'labelled {data.classes[data.test.targets[index]]}'
        )
    if has_picture:
        print(f'The training curves and more of the images: {printable(out / PICTURE)}')
