"""Training of one model, with timm's optimizers, schedulers, moving average and checkpoints, resumable at any epoch."""

import argparse
import ast
import difflib
import itertools
import pickle
import re
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from _batches import Batches, Settings
from _cli import UserError, one_line
from _profile import Profile, count
from _report import read_csv, write_csv
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from tqdm import tqdm


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: known ones that are close, if any."""
    close = difflib.get_close_matches(name, known, n=3)
    return f'; did you mean {", ".join(close)}?' if close else ''


@dataclass(frozen=True)
class ModelSpec:
    """A timm model with options, as one command-line word."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f'{self.name}:{",".join(f"{key}={value}".replace(" ", "") for key, value in self.options)}'

    def __hash__(self) -> int:
        return hash(str(self))  # an option may be a list

    def create(self, num_classes: int) -> torch.nn.Module:
        try:
            return timm.create_model(self.name, pretrained=False, num_classes=num_classes, **dict(self.options))
        except Exception as e:  # a wrong option shows as anything
            raise UserError(f'{self} cannot be built: {one_line(e)}') from None


def parse_specs(word: str) -> list[ModelSpec]:
    """The models of one command-line word: name[:key=value[|value...],...]."""
    name, _, text = word.partition(':')
    if not timm.is_model(name):
        raise UserError(f'unknown model {name!r}{did_you_mean(name, timm.list_models())}')
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


def profile(spec: ModelSpec, num_classes: int, batches: Batches) -> Profile:
    """What the model costs at the size of the images; a UserError if it cannot be built or cannot take them."""
    with torch.device('meta'):
        model = spec.create(num_classes)
    size = batches.data_config(model)['input_size']
    try:
        costs = count(model, size)
        logits = model.eval()(torch.empty(1, *size, device='meta'))
    except Exception as e:  # a wrong option shows as anything
        raise UserError(
            f'{spec} cannot take images of {" x ".join(map(str, size))} (channels, height, width): '
            f'{one_line(e)}; give another --image-size or other options'
        ) from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        raise UserError(f'{spec} is no classifier: it does not put out {num_classes} logits an image')
    return costs


HISTORY = (
    'epoch',
    'lr',
    'train_loss',
    'test_loss',
    'accuracy',
    'seconds',
    'train_seconds',
    'train_images',
    'data_wait_seconds',
    'peak_memory_mib',
)


def make_optimizer(
    model: torch.nn.Module,
    settings: Settings,
    updates: int,
) -> tuple[torch.optim.Optimizer, Scheduler | None]:
    """timm's optimizer and scheduler for `updates` steps an epoch."""
    optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=0.9,
        filter_bias_and_bn=not settings.decay_norms,
    )
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
    return optimizer, scheduler


def check_optimizer(settings: Settings) -> None:
    """Raise a UserError if the optimizer cannot be used as `train` uses it."""
    layer = torch.nn.Linear(4, 4).to(settings.device)
    try:
        optimizer, _ = make_optimizer(layer, settings, updates=1)
        layer(torch.ones(2, 4, device=settings.device)).sum().backward()
        optimizer.step()
    except Exception as e:  # a missing package, an unfit device, a closure: each has its own
        raise UserError(f'--opt {settings.opt} cannot be used here: {one_line(e)}') from None


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
    updates = len(training)
    optimizer, scheduler = make_optimizer(model, settings, updates)
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
        history.append(
            dict(
                zip(
                    HISTORY,
                    (
                        epoch,
                        optimizer.param_groups[0]['lr'],
                        train_loss,
                        test_loss,
                        accuracy,
                        time.perf_counter() - started,
                        trained - started,
                        count,
                        waited,
                        peak_memory(device),
                    ),
                    strict=True,
                )
            )
        )
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
        raise UserError(
            f'the checkpoint in {run_dir} cannot be written, probably the disk is full '
            f'({str(e).splitlines()[0]}); free some space and run it again'
        ) from None


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
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, UserError):
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
        return history[: epoch + 1]
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
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == 'linux':
        return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 1024)
