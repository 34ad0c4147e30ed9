"""Train a grid of models x options x seeds under one protocol, and tabulate, compare and plot what comes out.

    python scripts/reproduce.py --dataset digits --image-size 16 --crop-padding 2 --protocol modern --epochs 20 \\
        --models cifar_resnet20 cifar_seresnet20 cifar_senetv2_resnet20 --seeds 0 1 2 3 4 --out output/digits

A model is a timm name, with options after a colon: cifar_senetv2_resnet20:sae_cardinality=2,sae_reduction=8. Values are
Python literals; values parted by | make a grid: 'cifar_senetv2_resnet20:sae_cardinality=1|2|4|8,sae_reduction=8|16|32'.

Protocols (a number that has an option below can be overridden by it):
  seanet    the SEANet authors': SGD, momentum 0.9, lr 0.1, weight decay 1e-4 on all parameters, batch 64, 200 epochs,
            lr x 0.1 every 80 epochs
  senetv2   SENetV2's: Adam and cross-entropy; the paper leaves the rest unstated, here Keras' lr of 0.001, batch 64,
            100 epochs
  modern    for few epochs: SGD with Nesterov momentum 0.9, lr 0.1 risen to over a fifth of the epochs, then cosine,
            weight decay 5e-4 (norms and biases exempt), label smoothing 0.1, batch 128, 10 epochs
Each augments by random crop (padding 4) and horizontal flip (not for digits). Before that the images of a folder are
resized and cropped to the input's size as timm evaluates ResNets (bicubic, 0.875), whatever the model. Images that do
not fill the last batch of an epoch wait for another epoch.

In --out: results.csv (a row a run), curves.csv (a row an epoch), table.md, accuracy_vs_parameters.png, curves.png.
Accuracies are in percent of the test images: `accuracy` after the last epoch, `best_accuracy` that of the best epoch
on the test images, which is what the papers report and is optimistic. Killed at any moment and started again with the
same arguments, it goes on at the last finished epoch and repeats no finished run. Started several times at once, say
once a GPU under CUDA_VISIBLE_DEVICES, the processes share out the runs, write to the same files, and end when all runs
are done; those of a process that was stopped are made by the others.
"""

import argparse
import hashlib
import json
import math
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import timm
import torch
from _batches import Batches, Settings
from _cli import UserError, run
from _data import load_dataset
from _profile import Profile
from _report import (
    FORMAT,
    Row,
    caption,
    plot_accuracy,
    plot_curves,
    read_csv,
    table,
    write_atomically,
    write_csv,
)
from _training import ModelSpec, check_optimizer, did_you_mean, parse_specs, profile, train
from filelock import FileLock, Timeout
from safetensors.torch import save
from timm.optim import list_optimizers
from tqdm import tqdm

import timm_senetv2

PROTOCOLS = {
    'seanet': dict(
        opt='momentum',
        lr=0.1,
        weight_decay=1e-4,
        decay_norms=True,
        batch_size=64,
        epochs=200,
        sched='step',
        label_smoothing=0.0,
    ),
    'senetv2': dict(
        opt='adam',
        lr=1e-3,
        weight_decay=0.0,
        decay_norms=False,
        batch_size=64,
        epochs=100,
        sched='none',
        label_smoothing=0.0,
    ),
    'modern': dict(
        opt='sgd',
        lr=0.1,
        weight_decay=5e-4,
        decay_norms=False,
        batch_size=128,
        epochs=10,
        sched='cosine',
        label_smoothing=0.1,
    ),
}


RESULTS = (
    'format',
    'run',
    'model',
    'seed',
    'accuracy',
    'loss',
    'best_accuracy',
    'best_epoch',
    'parameters',
    'gmacs',
    'seconds',
    'images_per_second',
    'data_wait_share',
    'peak_memory_mib',
    *Settings.__dataclass_fields__,
    'torch',
    'timm',
    'timm_senetv2',
    'python',
    'processor',
    'command',
)
CURVES = ('format', 'run', 'model', 'seed', 'epoch', 'lr', 'train_loss', 'test_loss', 'accuracy')


def run_id(spec: ModelSpec, seed: int, settings: Settings) -> str:
    digest = hashlib.sha256(json.dumps([str(spec), asdict(settings)]).encode()).hexdigest()[:8]
    return f'{re.sub(r"[^A-Za-z0-9_.=-]+", "_", str(spec))}-seed{seed}-{digest}'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--models', nargs='+', required=True, metavar='MODEL[:KEY=VALUE,...]', help='models to train')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], metavar='N', help='seeds (default: 0)')
    parser.add_argument('--baseline', metavar='MODEL', help='model the others are compared with (default: the first)')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder of the results')
    parser.add_argument(
        '--dataset',
        required=True,
        metavar='NAME|DIR',
        help='digits, fashion-mnist, cifar10, cifar100, or an image folder',
    )
    parser.add_argument('--data-dir', metavar='DIR', help='where the data set is, or is downloaded to')
    parser.add_argument('--no-download', action='store_true', help='fail where the data set is not there')
    parser.add_argument('--limit', type=int, metavar='N', help='use only N training and N test images')
    parser.add_argument('--image-size', type=int, metavar='N', help="side of the input (default: the model's)")
    parser.add_argument(
        '--workers', type=int, default=4, metavar='N', help='processes that read an image folder (default: 4)'
    )
    parser.add_argument(
        '--save-weights', action='store_true', help="write each run's final weights to OUT/weights as safetensors"
    )
    parser.add_argument('--keep-checkpoints', action='store_true', help='keep the checkpoints of finished runs')

    protocol = parser.add_argument_group('protocol')
    protocol.add_argument(
        '--protocol', default='modern', metavar='NAME', help=f'{", ".join(PROTOCOLS)} (default: modern)'
    )
    protocol.add_argument('--epochs', type=int, metavar='N')
    protocol.add_argument('--batch-size', type=int, metavar='N')
    protocol.add_argument('--opt', metavar='NAME', help="an optimizer of timm's")
    protocol.add_argument('--lr', type=float, metavar='X')
    protocol.add_argument('--weight-decay', type=float, metavar='X')
    protocol.add_argument('--sched', choices=('cosine', 'step', 'none'))
    protocol.add_argument('--label-smoothing', type=float, metavar='X')
    protocol.add_argument(
        '--crop-padding',
        type=int,
        default=4,
        metavar='N',
        help='pixels of black around an image before the random crop (default: 4)',
    )
    protocol.add_argument(
        '--hflip',
        action=argparse.BooleanOptionalAction,
        default=None,
        help='horizontal flip (default: on, for digits off)',
    )
    protocol.add_argument(
        '--ema-decay', type=float, metavar='X', help='evaluate the moving average of the weights, with this decay'
    )

    machine = parser.add_argument_group('machine')
    machine.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=('cpu', 'cuda'))
    machine.add_argument(
        '--amp',
        nargs='?',
        const='bfloat16',
        choices=('bfloat16', 'float16'),
        help='mixed precision (bfloat16 unless float16 is named)',
    )
    machine.add_argument('--channels-last', action='store_true', help='channels-last memory format')
    machine.add_argument('--compile', action='store_true', help='torch.compile the model')
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    if args.protocol not in PROTOCOLS:
        raise UserError(f'unknown protocol {args.protocol!r}: choose {", ".join(PROTOCOLS)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch sees no GPU; leave the option out to run on the CPU')
    protocol = {
        key: getattr(args, key, None) if getattr(args, key, None) is not None else value
        for key, value in PROTOCOLS[args.protocol].items()
    }
    for name, value, least in (
        ('--epochs', protocol['epochs'], 1),
        ('--batch-size', protocol['batch_size'], 2),
        ('--image-size', args.image_size, 1),
        ('--crop-padding', args.crop_padding, 0),
        ('--workers', args.workers, 0),
        ('--weight-decay', protocol['weight_decay'], 0),
        ('--seeds', min(args.seeds), 0),
    ):
        if value is not None and not value >= least:
            raise UserError(f'{name} must be at least {least}, got {value}')
    if max(args.seeds) >= 2**63:
        raise UserError(f'--seeds must be below 2**63, got {max(args.seeds)}')
    if protocol['opt'] not in list_optimizers():
        raise UserError(f'unknown optimizer {protocol["opt"]!r}{did_you_mean(protocol["opt"], list_optimizers())}')
    if not 0 < protocol['lr'] < math.inf:
        raise UserError(f'--lr must be above 0 and finite, got {protocol["lr"]}')
    if math.isinf(protocol['weight_decay']):
        raise UserError('--weight-decay must be finite')
    if not args.out:
        raise UserError('--out needs the name of a folder')
    for name, value in (('--label-smoothing', protocol['label_smoothing']), ('--ema-decay', args.ema_decay or 0.0)):
        if not 0 <= value < 1:
            raise UserError(f'{name} must be in 0 to 1, below 1, got {value}')
    return Settings(
        dataset=args.dataset,
        limit=args.limit,
        image_size=args.image_size,
        protocol=args.protocol,
        **protocol,
        crop_padding=args.crop_padding,
        hflip=args.hflip if args.hflip is not None else args.dataset != 'digits',
        ema_decay=args.ema_decay,
        amp=args.amp,
        channels_last=args.channels_last,
        compile=args.compile,
        device=args.device,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = settings_of(args)
    specs = list(dict.fromkeys(spec for word in args.models for spec in parse_specs(word)))
    seeds = list(dict.fromkeys(args.seeds))
    out = Path(args.out)
    rows = rows_of(out, settings)
    if {row['run'] for row in rows} - {row['run'] for row in read_csv(out / 'curves.csv', CURVES)}:
        raise UserError(f'{out / "curves.csv"} lacks runs that results.csv has; put it back, or move both away')
    baseline = baseline_of(args.baseline, specs, rows)
    check_optimizer(settings)
    data = load_dataset(args.dataset, args.data_dir, not args.no_download, args.limit)
    batches = Batches(data, settings, args.workers)
    profiles = {spec: profile(spec, len(data.classes), batches) for spec in specs}
    try:
        (out / 'runs').mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as e:
        raise UserError(f'--out {out} cannot be made a folder: {e.strerror}') from None

    torch.backends.cudnn.deterministic = True
    grid = [(spec, seed, run_id(spec, seed, settings)) for seed in seeds for spec in specs]
    command = shlex.join(['python', 'scripts/reproduce.py', *(sys.argv[1:] if argv is None else argv)])
    left = []  # to other processes; waited for at the end, and made if one of those was stopped
    with tqdm(total=len(grid) * settings.epochs, unit='epoch', disable=None, mininterval=1) as bar:
        for spec, seed, name in chain(grid, left):
            run_dir = out / 'runs' / name
            with claimed(run_dir, wait=(spec, seed, name) in left) as ours:
                if not ours:
                    tqdm.write(f'{spec} seed {seed}: left to another process, which is at it')
                    left.append((spec, seed, name))
                    continue
                if name in {row['run'] for row in read_csv(out / 'results.csv', RESULTS)}:
                    bar.update(settings.epochs)
                    continue
                bar.set_description(f'{spec} seed {seed}')
                model, history = train(spec, seed, settings, batches, run_dir, bar)
                with files_of(out):
                    finish(out, name, spec, seed, settings, model, history, profiles[spec], command, args.save_weights)
                if not args.keep_checkpoints:
                    shutil.rmtree(run_dir)
            tqdm.write(
                f'{spec} seed {seed}: accuracy {history[-1]["accuracy"]:.2f} % after {settings.epochs} epochs, '
                f'best {max(row["accuracy"] for row in history):.2f} %'
            )
    with files_of(out):
        print(report(out, settings, baseline))


@contextmanager
def claimed(run_dir: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process may make a run: while it is inside, no other may. With `wait` it may, sooner or later."""
    lock = FileLock(run_dir.with_name(f'{run_dir.name}.lock'))
    try:
        lock.acquire(blocking=wait, poll_interval=0.5)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def baseline_of(word: str | None, specs: list[ModelSpec], rows: list[Row]) -> str:
    """The model that the others are compared with: the one asked for, if it is of this grid or of finished runs."""
    if word is None:
        return str(specs[0])
    chosen = parse_specs(word)
    if len(chosen) > 1 or str(chosen[0]) not in {*map(str, specs), *(row['model'] for row in rows)}:
        raise UserError(f'--baseline {word} must be one of the models: {", ".join(map(str, specs))}')
    return str(chosen[0])


def files_of(out: Path) -> FileLock:
    """To be held while the files in `out` are read and written anew."""
    return FileLock(out / 'runs' / 'files.lock')


def finish(
    out: Path,
    name: str,
    spec: ModelSpec,
    seed: int,
    settings: Settings,
    model: torch.nn.Module,
    history: list[dict[str, float]],
    costs: Profile,
    command: str,
    save_weights: bool,
) -> None:
    """Add a finished run to the files in `out`, results.csv last, since a run listed there is never run again."""
    if save_weights:
        (out / 'weights').mkdir(exist_ok=True)
        state = {key: tensor.cpu().contiguous() for key, tensor in model.state_dict().items()}
        write_atomically(out / 'weights' / f'{name}.safetensors', save(state))
    columns = dict(format=FORMAT, run=name, model=str(spec), seed=seed)
    curves = [row for row in read_csv(out / 'curves.csv', CURVES) if row['run'] != name]
    curves += [
        {
            **columns,
            'epoch': int(row['epoch']) + 1,
            'lr': f'{row["lr"]:.6g}',
            'accuracy': f'{row["accuracy"]:.4f}',
            'train_loss': f'{row["train_loss"]:.6f}',
            'test_loss': f'{row["test_loss"]:.6f}',
        }
        for row in history
    ]
    write_csv(out / 'curves.csv', CURVES, curves)

    best = max(history, key=lambda row: row['accuracy'])
    train_seconds = sum(row['train_seconds'] for row in history)
    row = dict(
        **columns,
        accuracy=f'{history[-1]["accuracy"]:.4f}',
        loss=f'{history[-1]["test_loss"]:.6f}',
        best_accuracy=f'{best["accuracy"]:.4f}',
        best_epoch=int(best['epoch']) + 1,
        parameters=costs.params,
        gmacs=f'{costs.macs / 1e9:.6f}',
        seconds=f'{sum(row["seconds"] for row in history):.1f}',
        images_per_second=f'{sum(row["train_images"] for row in history) / train_seconds:.1f}',
        data_wait_share=f'{sum(row["data_wait_seconds"] for row in history) / train_seconds:.4f}',
        peak_memory_mib=f'{max(row["peak_memory_mib"] for row in history):.1f}',
        **asdict(settings),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_senetv2=timm_senetv2.__version__,
        python=platform.python_version(),
        processor=torch.cuda.get_device_name() if settings.device == 'cuda' else platform.machine(),
        command=command,
    )
    write_csv(out / 'results.csv', RESULTS, [*read_csv(out / 'results.csv', RESULTS), row])


def rows_of(out: Path, settings: Settings) -> list[Row]:
    """The finished runs in `out` under these settings."""
    ours = {key: '' if value is None else str(value) for key, value in asdict(settings).items()}
    return [row for row in read_csv(out / 'results.csv', RESULTS) if all(row[k] == v for k, v in ours.items())]


def report(out: Path, settings: Settings, baseline: str) -> str:
    """Write table and plots of all runs in `out` under these settings, and return the table."""
    rows = rows_of(out, settings)
    runs = {row['run'] for row in rows}
    curves = [row for row in read_csv(out / 'curves.csv', CURVES) if row['run'] in runs]
    commands = ''.join(f'{command}\n' for command in dict.fromkeys(row['command'] for row in rows))
    text = f'```bash\n{commands}```\n\n{table(rows, baseline)}\n{caption(rows, baseline)}'
    write_atomically(out / 'table.md', text)
    write_atomically(out / 'accuracy_vs_parameters.png', plot_accuracy(rows))
    write_atomically(out / 'curves.png', plot_curves(curves))
    return text


if __name__ == '__main__':
    run(main)
