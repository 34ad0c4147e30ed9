"""Training of one model, with timm's optimizers, schedulers, moving average and checkpoints, resumable at any epoch."""

import argparse
import csv
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

from timm_senetv2.errors import UserError, one_line, printable

from .batches import Batches
from .files import write_csv
from .settings import ModelSpec, Settings
from .warm_start import FreshUnits, Source, attention, build, freeze_all_but_attention, fresh_units, set_training

History = list[dict[str, float]]  # a row of HISTORY an epoch
Progress = Callable[[float, History], None]  # called with the epochs done, whole and parts, and the whole ones' rows
AfterEpoch = Callable[[int, torch.nn.Module], None]  # called with the epochs done and the model that was evaluated

HISTORY = ('epoch', 'lr', 'train_loss', 'test_loss', 'accuracy', 'seconds')


def make_optimizer(
    model: torch.nn.Module,
    settings: Settings,
    updates: int,
    attention_lr: float = 1.0,
) -> tuple[torch.optim.Optimizer, Scheduler | None]:
    """timm's optimizer and scheduler for `updates` steps an epoch, the attention at a multiple of the learning rate."""
    options: dict[str, Any] = dict(
        opt=settings.opt,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=0.9,
        filter_bias_and_bn=not settings.decay_norms,
    )
    if attention_lr != 1.0:
        options['param_group_fn'] = lambda model: _groups(model, settings, attention_lr)
    optimizer = create_optimizer_v2(model, **options)
    warmup: Any = 0.2 * settings.epochs if settings.sched == 'cosine' else 0
    scheduler, _ = create_scheduler_v2(
        optimizer,
        settings.sched,
        num_epochs=settings.epochs,
        decay_epochs=80,
        decay_rate=0.1,
        warmup_lr=settings.lr / 100,
        warmup_epochs=warmup,
        step_on_epochs=settings.sched != 'cosine',
        updates_per_epoch=updates,
    )
    return optimizer, scheduler


def _groups(model: torch.nn.Module, settings: Settings, attention_lr: float) -> list[dict[str, Any]]:
    """timm's groups, with and without weight decay, each once more for the attention."""
    ours = {id(p) for _, layer in attention(model) for p in layer.parameters()}
    if not ours:
        raise UserError(f'attention_lr={attention_lr:g}: {type(model).__name__} has no attention')
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    exempt: set[str] = getattr(model, 'no_weight_decay', set)()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = settings.decay_norms or parameter.ndim > 1 and not name.endswith('.bias')
            decay = settings.weight_decay if decays and name not in exempt else 0.0
            groups.setdefault((decay, attention_lr if id(parameter) in ours else 1.0), []).append(parameter)
    return [
        # timm's schedulers obey lr_scale; lr is for where there is no schedule
        dict(params=params, weight_decay=decay, lr=settings.lr * scale, initial_lr=settings.lr, lr_scale=scale)
        for (decay, scale), params in groups.items()
    ]


def check_optimizer(settings: Settings) -> None:
    """Raise a UserError if the optimizer cannot be used as `train` uses it."""
    device = settings.device if torch.cuda.is_available() else 'cpu'  # the GPUs may be those of other machines
    layer = torch.nn.Linear(4, 4).to(device)
    try:
        optimizer, _ = make_optimizer(layer, settings, updates=1)
        layer(torch.ones(2, 4, device=device)).sum().backward()
        optimizer.step()
    except Exception as e:  # a missing package, an unfit device, a closure: each has its own
        raise UserError(f'--opt {settings.opt} cannot be used here: {one_line(e)}') from None


def start(spec: ModelSpec, settings: Settings, batches: Batches, source: Source | None) -> torch.nn.Module:
    """The model where its training starts, on its device, with the parameters frozen that stay.

    Raises:
        UserError: It cannot be built, or has no attention where only that shall train.
    """
    model = build(spec, len(batches.data.classes), source).to(settings.device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if dict(spec.start_options).get('train_only') == 'attention':
        try:
            freeze_all_but_attention(model, source if spec.start != 'scratch' else None)
        except ValueError as e:
            raise UserError(f'{spec}: {one_line(e)}') from None
    return model


def start_optimizer(
    model: torch.nn.Module, spec: ModelSpec, settings: Settings, updates: int, source: Source | None
) -> tuple[torch.optim.Optimizer, Scheduler | None]:
    """The optimizer and scheduler that the model's word asks for."""
    own: dict[str, Any] = dict(spec.start_options)
    optimizer, scheduler = make_optimizer(model, settings, updates, own.get('attention_lr', 1.0))
    if 'fresh_lr' in own:
        stretch = FreshUnits(model, fresh_units(model, source), own['fresh_lr'])
        optimizer.register_step_pre_hook(stretch.before_step)
        optimizer.register_step_post_hook(stretch.after_step)
    return optimizer, scheduler


def autocast(settings: Settings) -> Any:
    """The context of a forward pass."""
    if settings.amp:
        return torch.autocast(torch.device(settings.device).type, dtype=getattr(torch, settings.amp))
    return nullcontext()


def update(
    forward: Any,
    images: torch.Tensor,
    targets: torch.Tensor,
    settings: Settings,
    amp: Any,
    optimizer: torch.optim.Optimizer,
    scaler: NativeScaler | None,
) -> torch.Tensor:
    """One step of training; returns the loss."""
    with amp:
        logits = forward(images)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings.label_smoothing)
    if scaler:
        scaler(loss, optimizer)
    else:
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(
    spec: ModelSpec,
    seed: int,
    settings: Settings,
    batches: Batches,
    source: Source | None = None,
    run_dir: Path | None = None,
    progress: Progress = lambda done, history: None,
    after_epoch: AfterEpoch = lambda epoch, model: None,
) -> tuple[torch.nn.Module, History]:
    """Train one model.

    Args:
        spec: The model, how it starts, and in what its training differs from the settings.
        seed: Of the weights, the order and the augmentation.
        settings: Of the grid.
        batches: Images.
        source: The weights that a spec may start from.
        run_dir: Where a checkpoint is kept; training goes on from its last finished epoch. None keeps none.
        progress: Called after each batch.
        after_epoch: Called after each epoch, in evaluation mode, before its checkpoint is written; not for those that
            were finished before.

    Returns:
        The model (its moving average where there is one) and its history.

    Raises:
        UserError: The model, the checkpoint's images or the disk do not permit it.
    """
    settings = spec.settings(settings)
    device = torch.device(settings.device)
    torch.manual_seed(seed)
    model = start(spec, settings, batches, source)
    training, test = batches.of(model, seed)
    if spec.start == 'keep':
        started = time.perf_counter()
        test_loss, accuracy = evaluate(model, test.batches(0), autocast(settings))
        row = (0, 0.0, math.nan, test_loss, accuracy, time.perf_counter() - started)
        history: History = [dict(zip(HISTORY, row, strict=True))]
        progress(settings.epochs, history)
        return model, history
    updates = len(training) * (settings.epoch_repeats or 1)
    optimizer, scheduler = start_optimizer(model, spec, settings, updates, source)
    scaler = NativeScaler(device=device.type) if settings.amp == 'float16' else None
    ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True) if settings.ema_decay else None

    history = []
    saver = None
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        fingerprint = batches.data.fingerprint()
        saver = CheckpointSaver(
            model,
            optimizer,
            args=argparse.Namespace(
                model=spec.name, model_kwargs=dict(spec.options), seed=seed, images=fingerprint, **asdict(settings)
            ),
            model_ema=ema,
            amp_scaler=scaler,
            checkpoint_dir=str(run_dir),
            max_history=1,
        )
        history = resume(run_dir, fingerprint, model, optimizer, ema, scaler, saver, device)
    progress(len(history), history)

    forward: Any = torch.compile(model) if settings.compile else model
    amp = autocast(settings)

    for epoch in range(len(history), settings.epochs):
        torch.manual_seed(_seed(seed, epoch))
        started = time.perf_counter()
        if scheduler:
            scheduler.step(epoch)
        forward.train()
        set_training(model)
        total, count = torch.zeros((), device=device), 0
        for i, (images, targets) in enumerate(_passes(training, seed, epoch, settings)):
            if scheduler:
                scheduler.step_update(epoch * updates + i)
            loss = update(forward, images, targets, settings, amp, optimizer, scaler)
            if ema:
                ema.update(model, step=epoch * updates + i)
            total += loss * len(targets)
            count += len(targets)
            if i + 1 < updates:
                progress(epoch + (i + 1) / updates, history)
        train_loss = total.item() / count  # waits for the device
        test_loss, accuracy = evaluate(ema.module if ema else forward, test.batches(0), amp)
        row = (epoch, optimizer.param_groups[0]['lr'], train_loss, test_loss, accuracy, time.perf_counter() - started)
        history.append(dict(zip(HISTORY, row, strict=True)))
        after_epoch(epoch + 1, ema.module if ema else model)
        if saver is not None and run_dir is not None:
            # first the history, then the checkpoint: a history that is ahead is cut on resuming, one that lags is not
            # made
            write_csv(run_dir / 'history.csv', HISTORY, history)
            save_checkpoint(saver, epoch, accuracy, run_dir)
        progress(epoch + 1, history)
    return ema.module if ema else model, history


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _passes(training: Any, seed: int, epoch: int, settings: Settings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of an epoch; each of its passes over the images has an order and an augmentation of its own."""
    yield from training.batches(_seed(seed, epoch))
    for repeat in range(1, settings.epoch_repeats or 1):
        yield from training.batches(_seed(seed, epoch, repeat))


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], amp: Any = None
) -> tuple[float, float]:
    """Mean cross-entropy, and top-1 accuracy in percent, of a model that is left in evaluation mode."""
    model.eval()
    count, loss, correct = 0, 0.0, 0.0
    sums: torch.Tensor | None = None
    for images, targets in batches:
        with amp or nullcontext():
            logits = model(images)
        part = torch.stack(
            (
                F.cross_entropy(logits.float(), targets, reduction='sum'),
                (logits.argmax(1) == targets).sum().float(),
            )
        )
        sums = part if sums is None else sums + part
        count += len(targets)
    assert sums is not None, 'no images'
    loss, correct = sums.tolist()
    return loss / count, 100 * correct / count


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
    images: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
    scaler: NativeScaler | None,
    saver: CheckpointSaver,
    device: torch.device,
) -> History:
    """Load the last whole checkpoint, if there is one, and return the history up to it.

    Raises:
        UserError: It was trained on other images.
    """
    # timm's writer unlinks `last` before it renames `tmp`: killed in between, only tmp and the best epoch's are left
    for path in (run_dir / 'last.pth.tar', run_dir / 'tmp.pth.tar', *run_dir.glob('checkpoint-*.pth.tar')):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location=device, weights_only=True)
            history = _read_history(run_dir / 'history.csv')
            epoch, args = checkpoint['epoch'], checkpoint['args']
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
            continue
        if len(history) <= epoch:
            continue
        if getattr(args, 'images', images) != images:
            raise UserError(
                f'the images of {printable(args.dataset)} have changed since the training in {printable(run_dir)} '
                f'began; put them back, or remove that folder to begin it again'
            )
        try:
            model.load_state_dict(checkpoint['state_dict'])
            optimizer.load_state_dict(checkpoint['optimizer'])
            if ema:
                ema.module.load_state_dict(checkpoint['state_dict_ema'])
            if scaler:
                scaler.load_state_dict(checkpoint[scaler.state_dict_key])
            saver.load_state_dict(checkpoint['saver'])
        except (RuntimeError, ValueError, KeyError) as e:
            raise UserError(
                f'{printable(path)} does not fit the model any more ({one_line(e)[:200]}); remove the folder '
                f'{printable(run_dir)} to begin this training again'
            ) from None
        return history[: epoch + 1]
    return []


def _read_history(path: Path) -> History:
    """The rows of a history, as `train` wrote it or as its version with more columns did."""
    with path.open(newline='', encoding='utf-8') as file:
        return [{k: float(row[k]) for k in HISTORY} for row in csv.DictReader(file)]
