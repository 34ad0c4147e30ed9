"""Train segmentation_models_pytorch's Unet on a trunk of timm-senetv2: on generated shapes, or on Pascal VOC.

    python docs/examples/segmentation.py                                    # shapes; some minutes on a CPU
    python docs/examples/segmentation.py --voc data --download --pretrained --size 512 --epochs 40 --device cuda

`--voc data` expects data/VOCdevkit/VOC2012, as the dataset's archive unpacks; `--download` fetches it. Prints the mean
intersection over union on held-out images after each epoch, and draws some of them. Needs
`pip install segmentation-models-pytorch matplotlib`. No import of timm-senetv2 is needed: timm finds the trunk.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNLABELLED = 255  # VOC's border pixels


class Shapes(Dataset):
    """Images (3, size, size) of a disc and a square on noise, and masks (size, size): 0 ground, 1 disc, 2 square."""

    classes = 3

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        image = torch.randn(3, self.size, self.size, generator=generator) * 0.5
        mask = torch.zeros(self.size, self.size, dtype=torch.long)
        rows, columns = torch.meshgrid(torch.arange(self.size), torch.arange(self.size), indexing='ij')
        for label in (1, 2):
            radius = self.size * (0.1 + 0.1 * float(torch.rand((), generator=generator)))
            y, x = (torch.rand(2, generator=generator) * (self.size - 2 * radius) + radius).tolist()
            dy, dx = (rows - y).abs(), (columns - x).abs()
            inside = dy**2 + dx**2 < radius**2 if label == 1 else torch.maximum(dy, dx) < radius
            image[:, inside] += torch.randn(3, 1, generator=generator) * 0.5 + 1
            mask[inside] = label
        return image, mask


class Voc(Dataset):
    """Pascal VOC 2012: images (3, size, size), masks (size, size) of 21 classes."""

    classes = 21

    def __init__(self, root: str, split: str, size: int, download: bool) -> None:
        self.data = datasets.VOCSegmentation(root, '2012', split, download=download)
        augment = [v2.RandomResizedCrop(size, (0.5, 2.0)), v2.RandomHorizontalFlip()] if split == 'train' else []
        self.transform = v2.Compose(
            [v2.ToImage(), *augment, v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True)]
        )
        self.normalize = v2.Normalize(MEAN, STD)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.data[index]
        image, mask = self.transform(image, tv_tensors.Mask(v2.functional.pil_to_tensor(mask)))
        return self.normalize(image), mask[0].long()


def build(trunk: str, classes: int, pretrained: bool) -> torch.nn.Module:
    return smp.Unet(f'tu-{trunk}', encoder_weights='imagenet' if pretrained else None, classes=classes)


@torch.no_grad()
def mean_iou(model: torch.nn.Module, loader: DataLoader, classes: int, device: str) -> float:
    model.eval()
    overlap, union = torch.zeros(classes), torch.zeros(classes)
    for images, masks in loader:
        found = model(images.to(device)).argmax(1).cpu()
        for c in range(classes):
            a, b = (found == c) & (masks != UNLABELLED), masks == c
            overlap[c] += (a & b).sum()
            union[c] += (a | b).sum()
    return float((overlap / union)[union > 0].mean())


def draw(model: torch.nn.Module, data: Dataset, path: Path, device: str, count: int = 4) -> None:
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    model.eval()
    count = min(count, len(data))
    figure, axes = plt.subplots(3, count, figsize=(2 * count, 6), squeeze=False)
    for column in range(count):
        image, mask = data[column]
        with torch.no_grad():
            found = model(image[None].to(device))[0].argmax(0).cpu()
        image = (image - image.amin()) / (image.amax() - image.amin())
        for row, picture in enumerate((image.permute(1, 2, 0), mask.masked_fill(mask == UNLABELLED, 0), found)):
            axes[row, column].imshow(picture, **({} if row == 0 else dict(vmin=0, vmax=data.classes - 1)))
            axes[row, column].set(xticks=[], yticks=[])
    for row, name in enumerate(('image', 'truth', 'found')):
        axes[row, 0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='senetv2_resnet18', help="timm's name of the trunk")
    parser.add_argument('--pretrained', action='store_true', help='start from the ImageNet weights of the trunk')
    parser.add_argument('--voc', metavar='DIR', help='folder with VOCdevkit/VOC2012, in place of shapes')
    parser.add_argument('--download', action='store_true', help='fetch VOC into that folder')
    parser.add_argument('--size', type=int, default=64, help='side of the images, a multiple of 32')
    parser.add_argument('--images', type=int, default=1024, help='training images, if they are generated')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--picture', type=Path, metavar='FILE', help='draw held-out images with what was found')
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    if args.voc:
        train, test = (Voc(args.voc, split, args.size, args.download) for split in ('train', 'val'))
    else:
        train, test = Shapes(args.images, args.size, seed=0), Shapes(min(64, args.images), args.size, seed=1)
    batches = dict(batch_size=args.batch_size, num_workers=args.workers)
    loader = DataLoader(train, shuffle=True, drop_last=len(train) > args.batch_size, **batches)
    model = build(args.model, train.classes, args.pretrained).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    iou = 0.0
    for epoch in range(args.epochs):
        model.train()
        for images, masks in loader:
            loss = torch.nn.functional.cross_entropy(
                model(images.to(args.device)), masks.to(args.device), ignore_index=UNLABELLED
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        iou = mean_iou(model, DataLoader(test, **batches), train.classes, args.device)
        print(f'epoch {epoch}: loss {loss.item():.3f}, mean IoU {iou:.3f}', flush=True)
    if args.picture:
        draw(model, test, args.picture, args.device)
    return iou


if __name__ == '__main__':
    main()
