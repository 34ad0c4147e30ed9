"""docs/examples: they train on what they draw, and read VOC and COCO as those unpack."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / 'docs' / 'examples'


@pytest.fixture
def segmentation(monkeypatch):
    pytest.importorskip('segmentation_models_pytorch')
    monkeypatch.syspath_prepend(EXAMPLES)
    import segmentation

    yield segmentation
    del sys.modules['segmentation']


@pytest.fixture
def detection(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import detection

    yield detection
    del sys.modules['detection']


def photo(path: Path, width: int, height: int, seed: int = 0) -> None:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


# ---- segmentation


def test_masks_lie_where_the_shapes_are_bright(segmentation):
    data = segmentation.Shapes(20, 64, seed=0)
    for image, mask in data:
        assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and set(mask.unique().tolist()) <= {0, 1, 2}
        assert image[:, mask > 0].mean() > image[:, mask == 0].mean() + 0.3
    again = segmentation.Shapes(20, 64, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(data[3], again[3], strict=True))
    assert not torch.equal(data[3][0], segmentation.Shapes(20, 64, seed=1)[3][0])


def test_mean_iou_of_known_answers(segmentation):
    """Class 0: 3 of 5 pixels overlap; class 1: 2 of 4; unlabelled pixels count for neither."""
    truth = torch.tensor([[[0, 0, 0, 0, 1, 1, 1, 255]]])
    found = torch.tensor([[[0, 0, 0, 1, 0, 1, 1, 1]]])
    model = torch.nn.Identity()
    scores = torch.nn.functional.one_hot(found, 3).movedim(-1, 1).float()
    assert segmentation.mean_iou(model, [(scores, truth)], 3, 'cpu') == pytest.approx((3 / 5 + 2 / 4) / 2)


def test_segmentation_trains_on_shapes_and_draws(segmentation, tmp_path, capsys):
    arguments = '--images 8 --size 32 --batch-size 4 --epochs 2'.split()
    segmentation.main([*arguments, '--picture', str(tmp_path / 'shapes.png')])
    assert capsys.readouterr().out.count('mean IoU') == 2
    assert Image.open(tmp_path / 'shapes.png').size[0] > 300


def test_segmentation_reads_voc(segmentation, tmp_path, capsys):
    root = tmp_path / 'VOCdevkit' / 'VOC2012'
    for split, names in dict(train=('a', 'b', 'c', 'd'), val=('e', 'f')).items():
        for name in names:
            photo(root / 'JPEGImages' / f'{name}.jpg', 50, 40)
            mask = Image.new('P', (50, 40), 255)
            mask.putpalette([i for i in range(256) for _ in range(3)])
            mask.paste(15, (10, 10, 30, 30))
            (root / 'SegmentationClass').mkdir(exist_ok=True)
            mask.save(root / 'SegmentationClass' / f'{name}.png')
        (root / 'ImageSets' / 'Segmentation').mkdir(parents=True, exist_ok=True)
        (root / 'ImageSets' / 'Segmentation' / f'{split}.txt').write_text('\n'.join(names) + '\n')
    image, mask = segmentation.Voc(str(tmp_path), 'val', 64, download=False)[0]
    assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and mask.dtype == torch.int64
    assert set(mask.unique().tolist()) == {15, 255} and mask[24:44, 20:35].eq(15).all()
    segmentation.main(['--voc', str(tmp_path), '--size', '32', '--batch-size', '2', '--epochs', '1'])
    assert 'mean IoU' in capsys.readouterr().out


# ---- detection


def test_boxes_fit_the_shapes(detection):
    """The last shape lies on top: within its box, and nowhere else, is its colour."""
    for image, target in detection.Shapes(20, 96, seed=0):
        left, top, right, bottom = target['boxes'][-1].tolist()
        colour = image[:, round((top + bottom) / 2), round((left + right) / 2)]
        rows, columns = (image == colour[:, None, None]).all(0).nonzero().T
        assert columns.min() == pytest.approx(left, abs=1.01) and columns.max() == pytest.approx(right, abs=1.01)
        assert rows.min() == pytest.approx(top, abs=1.01) and rows.max() == pytest.approx(bottom, abs=1.01)
        share = len(rows) / ((right - left) * (bottom - top))
        assert share == pytest.approx({1: 0.785, 2: 1}[int(target['labels'][-1])], abs=0.15)


def test_recall_of_known_answers(detection):
    """One box fits, one has the wrong class, one is unsure, one overlaps by a third."""
    boxes = torch.tensor([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10.0]])
    found = boxes + torch.tensor([[0.0], [0.0], [0.0], [5.0]]) * torch.tensor([1, 0, 1, 0])
    answer = dict(boxes=found, labels=torch.tensor([1, 2, 1, 1]), scores=torch.tensor([0.9, 0.9, 0.4, 0.9]))

    class Model(torch.nn.Module):
        def forward(self, images):
            return [answer]

    data = [(torch.zeros(3, 80, 80), dict(boxes=boxes, labels=torch.tensor([1, 1, 1, 1])))]
    assert detection.recall(Model(), data, 'cpu') == 1 / 4


def test_detection_trains_on_shapes_and_draws(detection, tmp_path, capsys):
    arguments = '--images 2 --size 64 --batch-size 2 --epochs 1 --proposals 20'.split()
    detection.main([*arguments, '--picture', str(tmp_path / 'shapes.png')])
    assert 'of the objects' in capsys.readouterr().out
    assert Image.open(tmp_path / 'shapes.png').size[0] > 300


def test_detection_reads_coco(detection, tmp_path, capsys):
    pytest.importorskip('pycocotools')
    for split in 'train', 'val':
        images = [dict(id=i, file_name=f'{i}.jpg', width=60, height=48) for i in (1, 2, 3)]
        for image in images:
            photo(tmp_path / f'{split}2017' / image['file_name'], 60, 48)
        boxes = [dict(id=i, image_id=i, category_id=90, bbox=[5, 6, 20, 30], area=600, iscrowd=0) for i in (1, 2)]
        (tmp_path / 'annotations').mkdir(exist_ok=True)
        (tmp_path / 'annotations' / f'instances_{split}2017.json').write_text(
            json.dumps(dict(images=images, annotations=boxes, categories=[dict(id=90, name='toothbrush')]))
        )
    data = detection.Coco(str(tmp_path), 'val')
    assert len(data) == 2  # the third image has no boxes
    image, target = data[0]
    assert image.shape == (3, 48, 60) and 0 <= image.min() and image.max() <= 1
    assert target['boxes'].tolist() == [[5, 6, 25, 36]] and target['labels'].tolist() == [90]
    detection.main(['--coco', str(tmp_path), '--size', '64', '--batch-size', '2', '--epochs', '1', '--proposals', '9'])
    assert 'of the objects' in capsys.readouterr().out
