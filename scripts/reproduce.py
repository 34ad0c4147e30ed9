"""Train a grid of models x options x seeds under one protocol, and tabulate, compare and plot what comes out.

    python scripts/reproduce.py --dataset digits --image-size 16 --crop-padding 2 --protocol modern --epochs 20 \\
        --models cifar_resnet20 cifar_seresnet20 senetv2_resnet20 --seeds 0 1 2 3 4 --out output/digits

A model is a timm name, with options after a colon: senetv2_resnet20:sae_cardinality=2,sae_reduction=8. Values are
Python literals; values parted by | make a grid: 'senetv2_resnet20:sae_cardinality=1|2|4|8,sae_reduction=8|16|32'.

Protocols (every number can be overridden by its option):
  seanet    the SEANet authors': SGD, momentum 0.9, lr 0.1, weight decay 1e-4 on all parameters, batch 64, 200 epochs,
            lr x 0.1 every 80 epochs
  senetv2   SENetV2's: Adam and cross-entropy; the paper leaves the rest unstated, here Keras' lr of 0.001, batch 64,
            100 epochs
  modern    for few epochs: SGD with Nesterov momentum 0.9, lr 0.1 risen to over a fifth of the epochs, then cosine,
            weight decay 5e-4 (norms and biases exempt), label smoothing 0.1, batch 128, 10 epochs
Each augments by random crop (padding 4) and horizontal flip (not for digits). Images that do not fill the last batch
of an epoch wait for another epoch.

In --out: results.csv (a row a run), curves.csv (a row an epoch), table.md, accuracy_vs_parameters.png, curves.png.
Accuracies are in percent of the test images: `accuracy` after the last epoch, `best_accuracy` that of the best epoch
on the test images, which is what the papers report and is optimistic. Killed at any moment and started again with the
same arguments, it goes on at the last finished epoch and repeats no finished run.
"""
import argparse
import ast
import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import platform
import re
import resource
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from _cli import UserError, run
from _data import ArrayImages, FileImages, ImageData, load_dataset
from _report import caption, plot_accuracy, plot_curves, table
from timm.data import create_loader, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

import timm_senetv2

FORMAT = 1  # of results.csv and curves.csv; raise it when a column changes its meaning
MEMORY_LIMIT = 2 * 2 ** 30  # bytes of images kept on the device; above it timm's loader reads them
PROTOCOLS = {
    'seanet': dict(
        opt='momentum', lr=0.1, weight_decay=1e-4, decay_norms=True, batch_size=64, epochs=200, sched='step',
        label_smoothing=0.),
    'senetv2': dict(
        opt='adam', lr=1e-3, weight_decay=0., decay_norms=False, batch_size=64, epochs=100, sched='none',
        label_smoothing=0.),
    'modern': dict(
        opt='sgd', lr=0.1, weight_decay=5e-4, decay_norms=False, batch_size=128, epochs=10, sched='cosine',
        label_smoothing=0.1),
}


@dataclass(frozen=True)
class Settings:
    """What, besides model and seed, determines a run's numbers."""
    dataset: str
    limit: int | None
    image_size: int | None
    protocol: str
    epochs: int
    batch_size: int
    opt: str
    lr: float
    weight_decay: float
    decay_norms: bool
    sched: str
    label_smoothing: float
    crop_padding: int
    hflip: bool
    ema_decay: float | None
    amp: str | None
    channels_last: bool
    compile: bool
    device: str


@dataclass(frozen=True)
class ModelSpec:
    """A timm model with options, as one command-line word."""
    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f'{self.name}:{",".join(f"{key}={value}".replace(" ", "") for key, value in self.options)}'

    def create(self, num_classes: int) -> torch.nn.Module:
        try:
            return timm.create_model(self.name, pretrained=False, num_classes=num_classes, **dict(self.options))
        except (TypeError, ValueError, AssertionError) as e:
            raise UserError(f'{self} cannot be built: {" ".join(str(e).split())}') from None


def parse_specs(word: str) -> list[ModelSpec]:
    """The models of one command-line word: name[:key=value[|value...],...]."""
    name, _, text = word.partition(':')
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f'unknown model {name!r}' + (f'; did you mean {", ".join(close)}?' if close else ''))
    keys, grids = [], []
    for part in re.split(r',(?![^\[(]*[\])])', text) if text else ():  # commas, but not those inside a list
        key, equals, values = part.partition('=')
        if not equals or not key.isidentifier() or not values:
            raise UserError(f'{word!r}: expected key=value after the colon, got {part!r}')
        keys.append(key)
        grids.append([_literal(value) for value in values.split('|')])
    return [ModelSpec(name, tuple(zip(keys, values, strict=True))) for values in itertools.product(*grids)]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class MemoryBatches:
    """Batches of a set of small images that lies on the device whole: crop, flip and normalisation are one gather."""

    def __init__(
            self,
            images: torch.Tensor,
            targets: torch.Tensor,
            settings: Settings,
            mean: tuple[float, ...],
            std: tuple[float, ...],
            training: bool,
    ) -> None:
        """Takes (N, H, W, 3) uint8 images and their (N,) class indices, on the device."""
        self.size = images.shape[1:3]
        self.padding = settings.crop_padding if training else 0
        pad = self.padding
        self.images = F.pad(images, (0, 0, pad, pad, pad, pad)) if pad else images
        self.targets = targets
        self.batch_size = settings.batch_size
        self.hflip = settings.hflip and training
        self.training = training
        self.memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.mean = torch.tensor(mean, device=images.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(std, device=images.device).view(1, 3, 1, 1) * 255
        self.waited = StopWatch(images.device)

    def __len__(self) -> int:
        full = len(self.targets) // self.batch_size
        return max(1, full) if self.training else -(-len(self.targets) // self.batch_size)

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        count, device = len(self.targets), self.targets.device
        self.waited.reset()
        with self.waited:
            order = torch.randperm(count, generator=generator) if self.training else torch.arange(count)
            top, left = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
            flip = torch.rand(count, generator=generator) < (0.5 if self.hflip else 0.)
            order, top, left, flip = (t.to(device) for t in (order, top, left, flip))
            rows, columns = (torch.arange(side, device=device) for side in self.size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            with self.waited:
                chosen = slice(start, start + self.batch_size)
                index = order[chosen]
                y = top[chosen, None] + rows
                x = torch.where(flip[chosen, None], columns.flip(0), columns) + left[chosen, None]
                images = self.images[index[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
                images = images.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)
                targets = self.targets[index]
            yield images, targets


class LoaderBatches:
    """Batches from files, through timm's loader, with the same augmentation."""

    def __init__(
            self,
            images: ArrayImages | FileImages,
            settings: Settings,
            data_config: dict[str, Any],
            training: bool,
            workers: int,
    ) -> None:
        self.loader = create_loader(
            images,
            batch_size=settings.batch_size,
            is_training=training,
            no_aug=True,
            num_workers=workers,
            persistent_workers=False,  # they would keep their random state, which a resumed run could not restore
            pin_memory=settings.device == 'cuda',
            device=torch.device(settings.device),
            **{k: data_config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
        )
        *resize, to_tensor = eval_transform(data_config).transforms
        augment = []
        if training:
            augment.append(transforms.RandomCrop(data_config['input_size'][1:], padding=settings.crop_padding))
            if settings.hflip:
                augment.append(transforms.RandomHorizontalFlip())
        images.transform = transforms.Compose([*resize, *augment, to_tensor])
        self.memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.waited = StopWatch(torch.device('cpu'))  # the loader works on the host whatever the device

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        torch.manual_seed(seed)  # of the order, and of the workers' own seeds
        self.waited.reset()
        with self.waited:
            iterator = iter(self.loader)
        while True:
            with self.waited:
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch[0].contiguous(memory_format=self.memory_format), batch[1]


class StopWatch:
    """Adds up the time spent inside `with` blocks: on CUDA that of the device's own work, else the host's."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == 'cuda'
        self.reset()

    def reset(self) -> None:
        self.total = 0.
        self.events = []

    def __enter__(self) -> None:
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.total += time.perf_counter() - self.start

    def seconds(self) -> float:
        """The sum; on CUDA to be called after a synchronisation."""
        return self.total + sum(start.elapsed_time(end) for start, end in self.events) / 1000


def eval_transform(data_config: dict[str, Any]) -> transforms.Compose:
    """timm's evaluation transform up to a (3, H, W) uint8 tensor, normalisation left to the device."""
    return create_transform(
        **{k: data_config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
        is_training=False,
        normalize=False,
    )


@dataclass
class Batches:
    """Training and test batches of one data set; those of models with the same input are made once."""
    data: ImageData
    settings: Settings
    workers: int
    made: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def of(self, model: torch.nn.Module) -> tuple[Any, Any]:
        size = self.settings.image_size
        config = resolve_data_config(
            {'mean': self.data.mean, 'std': self.data.std, **({'input_size': (3, size, size)} if size else {})},
            model=model,
        )
        key = json.dumps([config[k] for k in ('input_size', 'interpolation', 'crop_pct')])
        if key not in self.made:
            height, width = config['input_size'][1:]
            pad = 2 * self.settings.crop_padding
            fits = 3 * (height + pad) * (width + pad) * len(self.data.train) <= MEMORY_LIMIT
            self.made.clear()  # a set in memory is large
            self.made[key] = tuple(
                self._in_memory(images, config, training) if self.data.in_memory and fits
                else LoaderBatches(images, self.settings, config, training, self.workers)
                for images, training in ((self.data.train, True), (self.data.test, False))
            )
        return self.made[key]

    def _in_memory(self, images: ArrayImages, config: dict[str, Any], training: bool) -> MemoryBatches:
        images.transform = eval_transform(config)
        height, width = config['input_size'][1:]
        pixels = torch.empty(len(images), height, width, 3, dtype=torch.uint8)
        name = 'training' if training else 'test'
        for i in tqdm(range(len(images)), desc=f'{name} images', leave=False, disable=None):
            pixels[i] = images[i][0].permute(1, 2, 0)
        return MemoryBatches(
            pixels.to(self.settings.device),
            torch.tensor(images.targets).to(self.settings.device),
            self.settings, self.data.mean, self.data.std, training)


HISTORY = ('epoch', 'lr', 'train_loss', 'test_loss', 'accuracy', 'seconds', 'train_seconds', 'train_images',
           'data_wait_seconds', 'peak_memory_mib')


def train(
        spec: ModelSpec,
        seed: int,
        settings: Settings,
        batches: Batches,
        run_dir: Path,
        bar: tqdm,
) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Train one model, from the last finished epoch in `run_dir` if there is one.

    Returns:
        The model (its moving average where there is one) and a row of HISTORY an epoch.
    """
    device = torch.device(settings.device)
    torch.manual_seed(seed)
    model = spec.create(len(batches.data.classes)).to(device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    training, test = batches.of(model)
    optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=0.9,
        filter_bias_and_bn=not settings.decay_norms,
    )
    updates = len(training)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        settings.sched,
        num_epochs=settings.epochs,
        decay_epochs=80,
        decay_rate=0.1,
        warmup_lr=settings.lr / 100,
        warmup_epochs=0.2 * settings.epochs if settings.sched == 'cosine' else 0,
        step_on_epochs=settings.sched != 'cosine',
        updates_per_epoch=updates,
    )
    scaler = NativeScaler(device=device.type) if settings.amp == 'float16' else None
    ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True) if settings.ema_decay else None

    run_dir.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model=spec.name, model_kwargs=dict(spec.options), seed=seed, **asdict(settings)),
        model_ema=ema,
        amp_scaler=scaler,
        checkpoint_dir=str(run_dir),
        max_history=1,
    )
    history = resume(run_dir, model, optimizer, ema, scaler, saver, device)
    bar.update(len(history))

    forward = torch.compile(model) if settings.compile else model
    amp = torch.autocast(device.type, dtype=getattr(torch, settings.amp)) if settings.amp else nullcontext()

    def evaluate() -> tuple[float, float]:
        evaluated = ema.module if ema else forward
        evaluated.eval()
        loss, correct, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
        with torch.inference_mode():
            for images, targets in test.batches(0):
                with amp:
                    logits = evaluated(images)
                loss += F.cross_entropy(logits.float(), targets, reduction='sum')
                correct += (logits.argmax(1) == targets).sum()
                count += len(targets)
        return loss.item() / count, 100 * correct.item() / count

    for epoch in range(len(history), settings.epochs):
        epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        torch.manual_seed(epoch_seed)
        reset_peak_memory(device)
        started = time.perf_counter()
        scheduler and scheduler.step(epoch)
        forward.train()
        total, count = torch.zeros((), device=device), 0
        for i, (images, targets) in enumerate(training.batches(epoch_seed)):
            scheduler and scheduler.step_update(epoch * updates + i)
            with amp:
                logits = forward(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings.label_smoothing)
            if scaler:
                scaler(loss, optimizer)
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update(model, step=epoch * updates + i)
            total += loss.detach() * len(targets)
            count += len(targets)
            bar.set_postfix_str(f'batch {i + 1}/{updates}', refresh=False)
            bar.update(0)
        train_loss = total.item() / count  # waits for the device
        trained = time.perf_counter()
        waited = training.waited.seconds()
        test_loss, accuracy = evaluate()
        history.append(dict(zip(HISTORY, (
            epoch, optimizer.param_groups[0]['lr'], train_loss, test_loss, accuracy,
            time.perf_counter() - started, trained - started, count, waited, peak_memory(device),
        ), strict=True)))
        # first the history, then the checkpoint: a history that is ahead is cut on resuming, one that lags is not made
        write_csv(run_dir / 'history.csv', HISTORY, history)
        save_checkpoint(saver, epoch, accuracy, run_dir)
        bar.set_description(f'{spec} seed {seed}: {accuracy:.2f} %')
        bar.update()
    return ema.module if ema else model, history


def save_checkpoint(saver: CheckpointSaver, epoch: int, accuracy: float, run_dir: Path) -> None:
    try:
        saver.save_checkpoint(epoch, metric=accuracy)
    except RuntimeError as e:  # what torch's writer raises on a full disk
        raise UserError(f'the checkpoint in {run_dir} cannot be written, probably the disk is full '
                        f'({str(e).splitlines()[0]}); free some space and run it again') from None


def resume(
        run_dir: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: ModelEmaV3 | None,
        scaler: NativeScaler | None,
        saver: CheckpointSaver,
        device: torch.device,
) -> list[dict[str, float]]:
    """Load the last whole checkpoint, if there is one, and return the history up to it."""
    # timm's writer unlinks `last` before it renames `tmp`: killed in between, only tmp and the best epoch's are left
    for path in (run_dir / 'last.pth.tar', run_dir / 'tmp.pth.tar', *run_dir.glob('checkpoint-*.pth.tar')):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location=device, weights_only=True)
            history = [{k: float(v) for k, v in row.items()} for row in read_csv(run_dir / 'history.csv', HISTORY)]
        except (OSError, RuntimeError, EOFError, UserError):
            continue
        epoch = checkpoint['epoch']
        if len(history) <= epoch:
            continue
        model.load_state_dict(checkpoint['state_dict'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        if ema:
            ema.module.load_state_dict(checkpoint['state_dict_ema'])
        if scaler:
            scaler.load_state_dict(checkpoint[scaler.state_dict_key])
        saver.load_state_dict(checkpoint['saver'])
        return history[:epoch + 1]
    return []


def reset_peak_memory(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == 'linux':
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory(device: torch.device) -> float:
    """MiB since `reset_peak_memory`: allocated on CUDA, else resident in this process (elsewhere than on Linux the
    peak since its start)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if sys.platform == 'linux':
        return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 1024)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a file written by `write_csv`, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise UserError(f'{path} was not written by this version of the script (its columns differ); '
                            f'move it away or give another --out')
        rows = list(reader)
    for row in rows:
        if None in row or None in row.values() or row.get('format', str(FORMAT)) != str(FORMAT):
            raise UserError(f'{path} was written by another version of the script or is damaged; '
                            f'move it away or give another --out')
    return rows


RESULTS = (
    'format', 'run', 'model', 'seed', 'accuracy', 'loss', 'best_accuracy', 'best_epoch', 'parameters', 'gmacs',
    'seconds', 'images_per_second', 'data_wait_share', 'peak_memory_mib', *Settings.__dataclass_fields__,
    'torch', 'timm', 'timm_senetv2', 'python', 'processor', 'command',
)
CURVES = ('format', 'run', 'model', 'seed', 'epoch', 'lr', 'train_loss', 'test_loss', 'accuracy')


def count_costs(spec: ModelSpec, num_classes: int, batches: Batches) -> tuple[int, float]:
    """Parameters, and 10^9 multiply-adds for one image, of convolutions and dense layers."""
    with torch.device('meta'):
        model = spec.create(num_classes).eval()
    size = batches.settings.image_size
    config = resolve_data_config({'input_size': (3, size, size)} if size else {}, model=model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, *config['input_size'], device='meta'))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


def run_id(spec: ModelSpec, seed: int, settings: Settings) -> str:
    digest = hashlib.sha256(json.dumps([str(spec), asdict(settings)]).encode()).hexdigest()[:8]
    return f'{re.sub(r"[^A-Za-z0-9_.=-]+", "_", str(spec))}-seed{seed}-{digest}'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--models', nargs='+', required=True, metavar='MODEL[:KEY=VALUE,...]', help='models to train')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], metavar='N', help='seeds (default: 0)')
    parser.add_argument('--baseline', metavar='MODEL', help='model the others are compared with (default: the first)')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder of the results')
    parser.add_argument('--dataset', required=True, metavar='NAME|DIR',
                        help='digits, fashion-mnist, cifar10, cifar100, or an image folder')
    parser.add_argument('--data-dir', metavar='DIR', help='where the data set is, or is downloaded to')
    parser.add_argument('--no-download', action='store_true', help='fail where the data set is not there')
    parser.add_argument('--limit', type=int, metavar='N', help='use only N training and N test images')
    parser.add_argument('--image-size', type=int, metavar='N', help="side of the input (default: the model's)")
    parser.add_argument('--workers', type=int, default=4, metavar='N',
                        help='processes that read an image folder (default: 4)')
    parser.add_argument('--save-weights', action='store_true',
                        help="write each run's final weights to OUT/weights as safetensors")
    parser.add_argument('--keep-checkpoints', action='store_true', help='keep the checkpoints of finished runs')

    protocol = parser.add_argument_group('protocol')
    protocol.add_argument('--protocol', default='modern', metavar='NAME',
                          help=f'{", ".join(PROTOCOLS)} (default: modern)')
    protocol.add_argument('--epochs', type=int, metavar='N')
    protocol.add_argument('--batch-size', type=int, metavar='N')
    protocol.add_argument('--opt', metavar='NAME', help="an optimizer of timm's")
    protocol.add_argument('--lr', type=float, metavar='X')
    protocol.add_argument('--weight-decay', type=float, metavar='X')
    protocol.add_argument('--sched', choices=('cosine', 'step', 'none'))
    protocol.add_argument('--label-smoothing', type=float, metavar='X')
    protocol.add_argument('--crop-padding', type=int, default=4, metavar='N',
                          help='pixels of black around an image before the random crop (default: 4)')
    protocol.add_argument('--hflip', action=argparse.BooleanOptionalAction, default=None,
                          help='horizontal flip (default: on, for digits off)')
    protocol.add_argument('--ema-decay', type=float, metavar='X',
                          help='evaluate the moving average of the weights, with this decay')

    machine = parser.add_argument_group('machine')
    machine.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=('cpu', 'cuda'))
    machine.add_argument('--amp', nargs='?', const='bfloat16', choices=('bfloat16', 'float16'),
                         help='mixed precision (bfloat16 unless float16 is named)')
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
            ('--epochs', protocol['epochs'], 1), ('--batch-size', protocol['batch_size'], 2),
            ('--image-size', args.image_size or 1, 1), ('--crop-padding', args.crop_padding, 0),
            ('--workers', args.workers, 0)):
        if value < least:
            raise UserError(f'{name} must be at least {least}, got {value}')
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
    baseline = str(parse_specs(args.baseline)[0] if args.baseline else specs[0])
    seeds = list(dict.fromkeys(args.seeds))
    out = Path(args.out)
    results = read_csv(out / 'results.csv', RESULTS)
    read_csv(out / 'curves.csv', CURVES)
    data = load_dataset(args.dataset, args.data_dir, not args.no_download, args.limit)
    batches = Batches(data, settings, args.workers)
    costs = {spec: count_costs(spec, len(data.classes), batches) for spec in specs}  # and every spec can be built
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as e:
        raise UserError(f'--out {out} cannot be made a folder: {e.strerror}') from None

    torch.backends.cudnn.deterministic = True
    done = {row['run'] for row in results}
    grid = [(spec, seed, run_id(spec, seed, settings)) for seed in seeds for spec in specs]
    command = shlex.join(['python', 'scripts/reproduce.py', *(sys.argv[1:] if argv is None else argv)])
    with tqdm(total=len(grid) * settings.epochs, unit='epoch', disable=None, mininterval=1) as bar:
        for spec, seed, name in grid:
            if name in done:
                bar.update(settings.epochs)
                continue
            run_dir = out / 'runs' / name
            bar.set_description(f'{spec} seed {seed}')
            model, history = train(spec, seed, settings, batches, run_dir, bar)
            finish(out, name, spec, seed, settings, model, history, costs[spec], command, args.save_weights)
            if not args.keep_checkpoints:
                shutil.rmtree(run_dir)
            tqdm.write(f'{spec} seed {seed}: accuracy {history[-1]["accuracy"]:.2f} % after {settings.epochs} epochs, '
                       f'best {max(row["accuracy"] for row in history):.2f} %')
    print(report(out, settings, baseline))


def finish(
        out: Path,
        name: str,
        spec: ModelSpec,
        seed: int,
        settings: Settings,
        model: torch.nn.Module,
        history: list[dict[str, float]],
        costs: tuple[int, float],
        command: str,
        save_weights: bool,
) -> None:
    """Add a finished run to the files in `out`, results.csv last, since a run listed there is never run again."""
    from safetensors.torch import save
    if save_weights:
        (out / 'weights').mkdir(exist_ok=True)
        state = {key: tensor.cpu().contiguous() for key, tensor in model.state_dict().items()}
        write_atomically(out / 'weights' / f'{name}.safetensors', save(state))
    columns = dict(format=FORMAT, run=name, model=str(spec), seed=seed)
    curves = [row for row in read_csv(out / 'curves.csv', CURVES) if row['run'] != name]
    curves += [
        {**columns, 'epoch': int(row['epoch']) + 1, 'lr': f'{row["lr"]:.6g}', 'accuracy': f'{row["accuracy"]:.4f}',
         'train_loss': f'{row["train_loss"]:.6f}', 'test_loss': f'{row["test_loss"]:.6f}'}
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
        parameters=costs[0],
        gmacs=f'{costs[1]:.6f}',
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


def report(out: Path, settings: Settings, baseline: str) -> str:
    """Write table and plots of all runs in `out` under these settings, and return the table."""
    ours = {key: '' if value is None else str(value) for key, value in asdict(settings).items()}
    rows = [row for row in read_csv(out / 'results.csv', RESULTS) if all(row[k] == v for k, v in ours.items())]
    runs = {row['run'] for row in rows}
    curves = [row for row in read_csv(out / 'curves.csv', CURVES) if row['run'] in runs]
    commands = ''.join(f'{command}\n' for command in dict.fromkeys(row['command'] for row in rows))
    text = f'```bash\n{commands}```\n\n{table(rows, baseline)}\n{caption(rows, baseline)}'
    write_atomically(out / 'table.md', text)
    write_atomically(out / 'accuracy_vs_parameters.png', plot_accuracy(rows))
    write_atomically(out / 'curves.png', plot_curves(curves))
    return text


if __name__ == '__main__':
    with warnings.catch_warnings():
        run(main)
