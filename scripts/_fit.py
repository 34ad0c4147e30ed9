"""What the quickstart does to each model, with timm's parts: train it for a few epochs, classify with it, save it."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from _cli import UserError
from _data import ImageData
from safetensors import SafetensorError
from timm.data import create_loader, resolve_model_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch import nn

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARMUP_EPOCHS = 1


@dataclass
class Fit:
    """A trained model, and how the training went.

    Attributes:
        name: Of timm's registry.
        model: In the mode and on the device it was left in.
        data_config: How images become its input, in timm's words.
        seconds: Of training, with an evaluation after each epoch.
        train_loss: Mean cross-entropy of each epoch, while training.
        test_loss: Mean cross-entropy after each epoch.
        test_accuracy: Percent, after each epoch.
    """

    name: str
    model: nn.Module
    data_config: dict[str, Any]
    seconds: float = 0.0
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def fit(
    name: str,
    data: ImageData,
    epochs: int,
    seed: int,
    device: torch.device,
    progress: Callable[[Fit], None] = lambda _: None,
) -> Fit:
    """Train a model from scratch.

    Args:
        name: Of timm's registry.
        data: Images; the model gets as many classes as they have.
        epochs: Passes over the training images.
        seed: Of the weights, the order and the augmentation.
        device: Where to train.
        progress: Called after each batch.
    """
    random_seed(seed)
    model = timm.create_model(name, num_classes=len(data.classes)).to(device, memory_format=torch.channels_last)
    own = resolve_model_data_config(model)
    result = Fit(name, model, dict(own, interpolation='bilinear', mean=data.mean, std=data.std, crop_pct=1.0))
    train_loader = _loader(data, result.data_config, device, is_training=True)
    test_loader = _loader(data, result.data_config, device)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=LEARNING_RATE, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=epochs,
        warmup_epochs=min(WARMUP_EPOCHS, epochs - 1),
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )

    start, update = time.perf_counter(), 0
    for _ in range(epochs):
        meter = AverageMeter()
        model.train()
        for images, targets in train_loader:
            scheduler.step_update(update)
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.update(loss.detach(), len(targets))
            update += 1
            progress(result)
        test_loss, test_accuracy = evaluate(model, test_loader)
        result.train_loss.append(float(meter.avg))
        result.test_loss.append(test_loss)
        result.test_accuracy.append(test_accuracy)
    result.seconds = time.perf_counter() - start
    model.to(memory_format=torch.contiguous_format)  # safetensors stores no other
    return result


def updates(data: ImageData, epochs: int) -> int:
    """How often `fit` calls its `progress`."""
    return epochs * (len(data.train) // _batch_size(data))


def _batch_size(data: ImageData) -> int:
    return min(BATCH_SIZE, len(data.train))  # timm's training loader drops the last, smaller batch


def _loader(data: ImageData, config: dict[str, Any], device: torch.device, is_training: bool = False) -> Iterable:
    augmentation = (
        dict(
            scale=(0.7, 1.0),
            ratio=(0.9, 1.1),
            hflip=0.0 if data.name == 'digits' else 0.5,  # a mirrored digit is none
            color_jitter=None,
        )
        if is_training
        else {}
    )
    return create_loader(
        data.train if is_training else data.test,
        batch_size=_batch_size(data),
        is_training=is_training,
        num_workers=0 if data.in_memory else min(4, os.cpu_count() or 1, len(data.train) // 256),
        device=device,
        **augmentation,
        **config,
    )


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable) -> tuple[float, float]:
    """Mean cross-entropy, and top-1 accuracy in percent."""
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    for images, targets in loader:
        logits = model(images.contiguous(memory_format=torch.channels_last))
        losses.update(F.cross_entropy(logits, targets).item(), len(targets))
        top1.update(accuracy(logits, targets)[0].item(), len(targets))
    return losses.avg, top1.avg


@torch.inference_mode()
def predict(model: nn.Module, data: ImageData, config: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Class probabilities of the test images, (images, classes), on the CPU; `config` is timm's data config."""
    model = model.to(device).eval()
    return torch.cat([model(images).softmax(1).cpu() for images, _ in _loader(data, config, device)])


def save(result: Fit, folder: Path, classes: tuple[str, ...]) -> None:
    """Write model.safetensors and config.json, from which timm rebuilds the model: preprocessing and labels too."""
    try:
        save_for_hf(
            result.model,
            str(folder),
            model_config=dict(label_names=list(classes), pretrained_cfg=dict(tag='quickstart')),
            safe_serialization=True,
            data_config=result.data_config,
        )
    except SafetensorError as e:  # a full disk, most often; safetensors has no error type of its own for it
        raise UserError(f'cannot write {folder}: {e}') from None
