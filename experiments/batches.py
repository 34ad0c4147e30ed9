"""Batches of images for training and testing: from the device's memory, or by timm's loader where they do not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_loader, create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from timm_senetv2.errors import UserError

from .data import ArrayImages, FileImages, ImageData
from .settings import Settings

MEMORY_LIMIT = 2 * 2**30  # bytes of training or of test images kept on the device; above it timm's loader reads them
READ_AT_ONCE = 256  # images


class MemoryBatches:
    """Batches of a set of images that lies on the device whole: crop, flip and normalisation are one gather."""

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

    def __len__(self) -> int:
        full = len(self.targets) // self.batch_size
        return max(1, full) if self.training else -(-len(self.targets) // self.batch_size)

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        count, device = len(self.targets), self.targets.device
        order = torch.randperm(count, generator=generator) if self.training else torch.arange(count)
        top, left = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        flip = torch.rand(count, generator=generator) < (0.5 if self.hflip else 0.0)
        order, top, left, flip = (t.to(device) for t in (order, top, left, flip))
        rows, columns = (torch.arange(side, device=device) for side in self.size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = slice(start, start + self.batch_size)
            index = order[chosen]
            y = top[chosen, None] + rows
            x = torch.where(flip[chosen, None], columns.flip(0), columns) + left[chosen, None]
            images = self.images[index[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
            images = images.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)
            yield images, self.targets[index]


class SeededImages(Dataset):
    """Images whose random transforms follow from seed and index alone, whichever worker reads them."""

    def __init__(self, images: ArrayImages | FileImages) -> None:
        self.images = images
        self.seed = 0
        self.transform = None  # create_loader sets one; that of `images` is used

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        generator = torch.default_generator  # what torchvision's transforms draw from
        state = generator.get_state()
        generator.manual_seed(int(np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)[0]))
        try:
            return self.images[index]
        finally:
            generator.set_state(state)


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
        self.images = SeededImages(images)
        dataset: Any = self.images
        self.loader = create_loader(
            dataset,
            batch_size=min(settings.batch_size, len(images)),
            is_training=training,
            no_aug=True,
            num_workers=workers,
            persistent_workers=False,  # they would keep the seed of their first epoch
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

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        torch.manual_seed(seed)  # of the order
        self.images.seed = seed
        for images, targets in self.loader:
            yield images.contiguous(memory_format=self.memory_format), targets


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
    made: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)

    def data_config(self, model: torch.nn.Module) -> dict[str, Any]:
        """timm's, with the model's input size unless another is asked for; the rest is the data set's, lest the models
        of one grid see different pixels: images of one size as they are, others as timm evaluates ResNets."""
        size = self.settings.image_size
        args: dict[str, Any] = dict(
            interpolation='bilinear' if self.data.size else 'bicubic',
            crop_pct=1.0 if self.data.size else 0.875,
            mean=self.data.mean,
            std=self.data.std,
        )
        return resolve_data_config({**args, 'input_size': (3, size, size)} if size else args, model=model)

    def check(self, model: torch.nn.Module) -> None:
        """Raise a UserError if the model's input and the augmentation do not go together."""
        side = min(self.data_config(model)['input_size'][1:])
        if self.settings.crop_padding >= max(side, 2):
            raise UserError(
                f'--crop-padding must be below the {side} pixels of the images, got {self.settings.crop_padding}'
            )

    def of(self, model: torch.nn.Module, seed: int = 0) -> tuple[Any, Any]:
        """Training and test batches for the model; the seed chooses the images where only few of a class are used."""
        config = self.data_config(model)
        size = config['input_size']
        few = self.settings.per_class
        key = (*size, seed if few else None)
        if key not in self.made:
            data = self.data.few(few, seed) if few else self.data
            height, width = size[1:]
            pad = 2 * self.settings.crop_padding
            most = max(len(data.train), len(data.test))
            fits = 3 * (height + pad) * (width + pad) * most <= MEMORY_LIMIT
            self.made.clear()  # a set in memory is large
            training, test = (
                self._in_memory(images, config, is_training)
                if fits
                else LoaderBatches(images, self.settings, config, is_training, self.workers)
                for images, is_training in ((data.train, True), (data.test, False))
            )
            self.made[key] = training, test
        return self.made[key]

    def _in_memory(self, images: ArrayImages | FileImages, config: dict[str, Any], training: bool) -> MemoryBatches:
        images.transform = eval_transform(config)
        height, width = config['input_size'][1:]
        pixels = torch.empty(len(images), height, width, 3, dtype=torch.uint8)
        name = 'training' if training else 'test'
        read: DataLoader = DataLoader(images, READ_AT_ONCE, num_workers=0 if self.data.in_memory else self.workers)
        parts = pixels.split(READ_AT_ONCE)
        for part, (batch, _) in zip(parts, tqdm(read, f'{name} images', leave=False, disable=None), strict=True):
            part.copy_(batch.permute(0, 2, 3, 1))
        return MemoryBatches(
            pixels.to(self.settings.device),
            torch.tensor(images.targets).to(self.settings.device),
            self.settings,
            self.data.mean,
            self.data.std,
            training,
        )
