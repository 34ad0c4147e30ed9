"""Train torchvision's Faster R-CNN over a feature pyramid of a timm-senetv2 trunk: on generated shapes, or on COCO.

    python docs/examples/detection.py                                       # shapes; some minutes on a CPU
    python docs/examples/detection.py --coco data/coco --pretrained --size 800 --proposals 1000 --device cuda

`--coco data/coco` expects train2017/, val2017/ and annotations/instances_{train,val}2017.json, as COCO unpacks, and
needs `pip install pycocotools`. Prints after each epoch how many of the objects in held-out images were found (a box of
the right class with an overlap of at least a half), and draws some. For COCO's own average precision, give the boxes to
pycocotools. No import of timm-senetv2 is needed: timm finds the trunk.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2

Target = dict[str, Tensor]


class Shapes(Dataset):
    """Images (3, size, size) in [0, 1] of two to three discs and squares on noise. Labels: 1 disc, 2 square."""

    classes = 3

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        image = torch.rand(3, self.size, self.size, generator=generator) * 0.3
        rows, columns = torch.meshgrid(torch.arange(self.size), torch.arange(self.size), indexing='ij')
        boxes, labels = [], []
        for _ in range(int(torch.randint(2, 4, (), generator=generator))):
            radius = self.size * (0.08 + 0.1 * float(torch.rand((), generator=generator)))
            y, x = (torch.rand(2, generator=generator) * (self.size - 2 * radius) + radius).tolist()
            label = int(torch.randint(1, 3, (), generator=generator))
            dy, dx = (rows - y).abs(), (columns - x).abs()
            inside = dy**2 + dx**2 < radius**2 if label == 1 else torch.maximum(dy, dx) < radius
            image[:, inside] = torch.rand(3, 1, generator=generator) * 0.5 + 0.5
            boxes.append([x - radius, y - radius, x + radius, y + radius])
            labels.append(label)
        return image, dict(boxes=torch.tensor(boxes), labels=torch.tensor(labels))


class Coco(Dataset):
    """COCO 2017: images (3, H, W) in [0, 1], of different sizes; its 90 category ids are the labels."""

    classes = 91

    def __init__(self, root: str, split: str) -> None:
        annotations = f'{root}/annotations/instances_{split}2017.json'
        data = datasets.CocoDetection(f'{root}/{split}2017', annotations)
        data.ids = [i for i in data.ids if data.coco.getAnnIds(imgIds=i, iscrowd=False)]
        flip = [v2.RandomHorizontalFlip()] if split == 'train' else []
        data.transforms = v2.Compose(
            [v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
        )
        self.data = datasets.wrap_dataset_for_transforms_v2(data, target_keys=('boxes', 'labels'))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.data[index]


class Pyramid(nn.Module):
    """A timm trunk under a feature pyramid: (N, 3, H, W) in, a dict of maps (N, 256, H / stride, W / stride) out."""

    def __init__(self, trunk: str, pretrained: bool, out_channels: int = 256) -> None:
        super().__init__()
        self.trunk = timm.create_model(trunk, pretrained=pretrained, features_only=True, out_indices=(1, 2, 3, 4))
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(self.trunk.feature_info.channels(), out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): features for i, features in enumerate(self.trunk(x))})


def build(trunk: str, classes: int, size: int, pretrained: bool, proposals: int) -> FasterRCNN:
    smallest = max(8, size // 25)
    return FasterRCNN(
        Pyramid(trunk, pretrained),
        num_classes=classes,
        rpn_anchor_generator=AnchorGenerator(
            tuple((smallest * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5
        ),
        box_roi_pool=MultiScaleRoIAlign(['0', '1', '2', '3'], output_size=7, sampling_ratio=2),
        rpn_post_nms_top_n_train=2 * proposals,
        rpn_post_nms_top_n_test=proposals,
        box_batch_size_per_image=min(512, proposals),
        min_size=size,
        max_size=round(size * 1.67),
    )


@torch.no_grad()
def recall(model: FasterRCNN, data: Dataset, device: str) -> float:
    """The share of the objects for which a box of the right class, scored at least 0.5, overlaps by a half."""
    model.eval()
    found = total = 0
    for image, target in data:
        answer = {k: v.cpu() for k, v in model([image.to(device)])[0].items()}
        sure = answer['scores'] >= 0.5
        fits = box_iou(target['boxes'], answer['boxes'][sure]) >= 0.5
        fits &= target['labels'][:, None] == answer['labels'][sure]
        found, total = found + int(fits.any(1).sum()), total + len(fits)
    return found / total


def draw(model: FasterRCNN, data: Dataset, path: Path, device: str, count: int = 4) -> None:
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    model.eval()
    count = min(count, len(data))
    figure, axes = plt.subplots(1, count, figsize=(3 * count, 3.2), squeeze=False)
    for axis, index in zip(axes[0], range(count), strict=True):
        image, _ = data[index]
        with torch.no_grad():
            answer = {k: v.cpu() for k, v in model([image.to(device)])[0].items()}
        axis.imshow(image.permute(1, 2, 0))
        for (x, y, right, bottom), label, score in zip(
            *(answer[k] for k in ('boxes', 'labels', 'scores')), strict=True
        ):
            if score >= 0.5:
                color = f'C{int(label)}'
                axis.add_patch(plt.Rectangle((x, y), right - x, bottom - y, fill=False, color=color, linewidth=2))
                axis.text(x, y, f'{int(label)}: {score:.0%}', color='white', backgroundcolor=color, fontsize=7)
        axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='senetv2_resnet18', help="timm's name of the trunk")
    parser.add_argument('--pretrained', action='store_true', help='start from the ImageNet weights of the trunk')
    parser.add_argument('--coco', metavar='DIR', help="COCO 2017's folder, in place of shapes")
    parser.add_argument('--size', type=int, default=128, help='shorter side of the images')
    parser.add_argument('--proposals', type=int, default=100, help='boxes of an image that are looked at closely')
    parser.add_argument('--images', type=int, default=128, help='training images, if they are generated')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--lr', type=float, default=3e-4)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--picture', type=Path, metavar='FILE', help='draw held-out images with what was found')
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    if args.coco:
        train, test = Coco(args.coco, 'train'), Coco(args.coco, 'val')
    else:
        train, test = Shapes(args.images, args.size, seed=0), Shapes(min(32, args.images), args.size, seed=1)
    loader = DataLoader(train, args.batch_size, shuffle=True, num_workers=args.workers, collate_fn=list)
    model = build(args.model, train.classes, args.size, args.pretrained, args.proposals).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    share = 0.0
    for epoch in range(args.epochs):
        model.train()
        for batch in loader:
            images = [image.to(args.device) for image, _ in batch]
            targets = [{name: value.to(args.device) for name, value in target.items()} for _, target in batch]
            loss = sum(model(images, targets).values())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()
            optimizer.zero_grad()
        share = recall(model, test, args.device)
        print(f'epoch {epoch}: loss {loss.item():.3f}, found {share:.1%} of the objects', flush=True)
    if args.picture:
        draw(model, test, args.picture, args.device)
    return share


if __name__ == '__main__':
    main()
