"""One consumer of timm's models, in a process without an import of ours: `python consumers.py NAME FOLDER`.

FOLDER holds what `timm-senetv2 push` wrote of a senetv2_resnet18 with random weights (`saved/`), an image (`image.png`)
and the logits of that image, prepared (`expected.pt`). The same model is `me/saved` on the Hub of the environment, for
checks that take it from there. Prints one JSON line: `result`, or `failure`.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME, SIZE, CLASSES = 'senetv2_resnet18', 64, 4
NAME32 = 'cifar_senetv2_resnet20'
REPO = 'me/saved'


@dataclass(frozen=True)
class Consumer:
    """The library, how it is called, with which model, and what it does; whether it needs a Hub."""

    library: str
    call: str
    model: str
    function: Callable[[Path], str]
    hub: bool = False

    every: ClassVar[dict[str, 'Consumer']] = {}


def consumer(library: str, call: str, model: str = NAME) -> Callable:
    """Register `function(folder) -> result`, which fails by an exception, under its name."""

    def register(function: Callable) -> Callable:
        Consumer.every[function.__name__] = Consumer(library, call, model, function)
        return function

    return register


def loader(library: str, call: str, folder: str = 'FOLDER', hub: str = 'REPO', model: str = NAME) -> Callable:
    """Register `function(folder, source) -> result` twice: the model comes from the folder, and from the Hub.

    `source` is what the library takes; in `call`, and in what is recorded, SOURCE stands for it.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__
        for suffix, shown, is_hub in (('', folder, False), ('_hub', hub, True)):
            run = partial(_from_source, function, shown)
            Consumer.every[name + suffix] = Consumer(library, call.replace('SOURCE', shown), model, run, is_hub)
        return function

    return register


def _from_source(function: Callable, shown: str, folder: Path) -> str:
    return function(folder, shown.replace('FOLDER', str(folder / 'saved')).replace('REPO', REPO))


# --- Helpers ---


def randomize(model: nn.Module) -> nn.Module:
    """Random norms: timm zeroes the last one of each residual branch, which hides the attention."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


def build(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model(NAME, num_classes=CLASSES, **kwargs))


def attention(model: nn.Module, count: int = 8) -> list[nn.Module]:
    """The attention layers, which are known here by their names alone."""
    found = [m for name, m in model.named_modules() if name.split('.')[-1] == 'se']
    assert len(found) == count, f'{len(found)} attention layers'
    assert all(type(m).__name__ == 'SqueezeAggregatedExcitation' for m in found)
    return found


def dataset(count: int = 16) -> tuple[Tensor, Tensor]:
    """Images whose class is where they are bright."""
    labels = torch.arange(count) % CLASSES
    images = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label) * SIZE // 2, SIZE)
        image[:, row * SIZE // 2 : row * SIZE // 2 + SIZE // 2, column : column + SIZE // 2] += 2
    return images, labels


def falls(losses: Iterable[float]) -> str:
    losses = list(losses)
    assert all(torch.isfinite(torch.tensor(losses))), losses
    first, last = losses[0], sum(losses[-3:]) / 3
    assert last < 0.8 * first, f'loss does not fall: {losses}'
    return f'loss {first:.2f} to {last:.2f} in {len(losses)} steps'


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int = 8, lr: float = 1e-3, count: int = 8) -> str:
    """Train all parameters that want it; the attention's must receive gradients and move."""
    layers = attention(model, count)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [m.fc1.weight.detach().clone() for m in layers]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        optimizer.step()
    for m, old in zip(layers, before, strict=True):
        assert m.fc1.weight.grad is not None and m.fc1.weight.grad.abs().max() > 0
        assert not torch.equal(m.fc1.weight, old)
    return falls(losses)


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=float(1e-5 * b.abs().max()))


def eager(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


# --- Dense prediction ---


def _segment(cls: str, **kwargs: object) -> str:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = randomize(
        getattr(smp, cls)(encoder_name=f'tu-{NAME}', encoder_weights=None, classes=2, **kwargs),
    )
    images, _ = dataset(4)
    masks = (images.mean(1) > 1).long()
    assert model(images).shape == (4, 2, SIZE, SIZE)
    return fit(model, lambda: F.cross_entropy(model(images), masks))


@consumer('segmentation-models-pytorch', "Unet('tu-senetv2_resnet18')")
def smp_unet(folder: Path) -> str:
    return _segment('Unet')


@consumer('segmentation-models-pytorch', "DeepLabV3Plus('tu-senetv2_resnet18', encoder_output_stride=16)")
def smp_deeplab(folder: Path) -> str:
    return _segment('DeepLabV3Plus', encoder_output_stride=16)


@consumer('segmentation-models-pytorch', "Unet('tu-cifar_senetv2_resnet20')", NAME32)
def smp_unet32(folder: Path) -> str:
    import segmentation_models_pytorch as smp

    answers = []
    for name in (NAME32, 'vit_tiny_patch16_224'):  # reductions 1, 1, 2, 4; and 16, 16, 16, …
        try:
            smp.Unet(f'tu-{name}', encoder_weights=None, encoder_depth=3, decoder_channels=(64, 32, 16))
        except ValueError as e:
            answers.append(str(e))
    assert len(answers) == 2 and answers[0] == answers[1], answers
    return f'refused, as a ViT of timm: {answers[0]}'


@consumer('segmentation-models-pytorch', 'UnetDecoder over features_only, out_indices=(1, 2, 3)', NAME32)
def smp_unet_decoder32(folder: Path) -> str:
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = randomize(timm.create_model(NAME32, features_only=True, out_indices=(1, 2, 3)))
            self.decoder = UnetDecoder(self.trunk.feature_info.channels(), (64, 32), n_blocks=2)
            self.head = nn.Conv2d(32, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.decoder(self.trunk(x)))

    torch.manual_seed(0)
    model = Segmenter()
    images, _ = dataset(4)
    masks = (images.mean(1) > 1).long()
    assert model(images).shape == (4, 2, SIZE, SIZE)
    return fit(model, lambda: F.cross_entropy(model(images), masks), count=9)


@consumer('torchvision', 'FasterRCNN over FeaturePyramidNetwork over features_only')
def torchvision_detection(folder: Path) -> str:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = randomize(timm.create_model(NAME, features_only=True, out_indices=(1, 2, 3, 4)))
            self.out_channels = 64
            self.fpn = FeaturePyramidNetwork(self.trunk.feature_info.channels(), self.out_channels)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return self.fpn({str(i): f for i, f in enumerate(self.trunk(x))})

    torch.manual_seed(0)
    detector = FasterRCNN(
        Backbone(),
        num_classes=2,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(['0', '1', '2', '3'], 7, 2),
        min_size=SIZE,
        max_size=SIZE,
        box_detections_per_img=5,
    )
    images, labels = dataset(4)
    half = SIZE // 2
    corners = [(int(i) % 2 * half, int(i) // 2 * half) for i in labels]
    targets = [
        dict(boxes=torch.tensor([[x, y, x + half, y + half]]).float(), labels=torch.tensor([1])) for x, y in corners
    ]
    result = fit(detector, lambda: sum(detector(list(images), targets).values()), steps=12)
    detector.eval()
    with torch.no_grad():
        boxes = detector(list(images))
    assert len(boxes) == 4 and all(b['boxes'].shape[1] == 4 for b in boxes)
    return result


# --- What we write, from the folder and from the Hub ---


@loader('timm', "create_model('SOURCE', pretrained=True)", 'local-dir:FOLDER', 'hf-hub:REPO')
def timm_create_model(folder: Path, source: str) -> str:
    model = timm.create_model(source, pretrained=True)
    x, expected = torch.load(folder / 'expected.pt')
    assert len(attention(model)) == 8
    assert torch.equal(eager(model, x), expected)
    other = timm.create_model(source, pretrained=True, num_classes=7).eval()
    assert eager(other, x).shape == (1, 7)
    with torch.no_grad():
        assert torch.equal(other.forward_features(x), model.forward_features(x))
    return 'logits equal; features equal with another num_classes'


@loader('transformers', 'TimmWrapperForImageClassification.from_pretrained(SOURCE)')
def transformers_classification(folder: Path, source: str) -> str:
    from transformers import TimmWrapperForImageClassification

    model, report = TimmWrapperForImageClassification.from_pretrained(source, output_loading_info=True)
    assert not report['missing_keys'] and not report['unexpected_keys'], report
    assert len(attention(model)) == 8
    x, expected = torch.load(folder / 'expected.pt')
    equal(eager(model, x).logits, expected)
    return 'logits equal'


@loader('transformers', 'TimmWrapperForImageClassification.from_pretrained(SOURCE, num_labels=7)')
def transformers_other_classes(folder: Path, source: str) -> str:
    from transformers import TimmWrapperForImageClassification

    model = TimmWrapperForImageClassification.from_pretrained(source, num_labels=7, ignore_mismatched_sizes=True)
    x, _ = torch.load(folder / 'expected.pt')
    own = timm.create_model(f'local-dir:{folder / "saved"}', pretrained=True).eval()
    assert eager(model, x).logits.shape == (1, 7)
    with torch.no_grad():
        equal(model.timm_model.forward_features(x), own.forward_features(x))
    return '7 logits, features equal'


@loader('transformers', "pipeline('image-classification', SOURCE)")
def transformers_pipeline(folder: Path, source: str) -> str:
    from PIL import Image
    from transformers import pipeline

    answers = pipeline('image-classification', source)(Image.open(folder / 'image.png'), top_k=CLASSES)
    _, expected = torch.load(folder / 'expected.pt')
    scores = expected.softmax(1)[0]
    order = scores.argsort(descending=True).tolist()
    assert [a['label'] for a in answers] == [('cat', 'dog', 'owl', 'yak')[i] for i in order], answers
    equal(torch.tensor([a['score'] for a in answers]), scores[order])
    return 'labels and probabilities equal'


@loader('transformers', 'AutoModel.from_pretrained(SOURCE)')
def transformers_automodel(folder: Path, source: str) -> str:
    from transformers import AutoModel

    x, _ = torch.load(folder / 'expected.pt')
    model = AutoModel.from_pretrained(source)
    assert len(attention(model)) == 8
    own = timm.create_model(f'local-dir:{folder / "saved"}', pretrained=True)
    with torch.no_grad():
        equal(model.eval()(x).last_hidden_state, own.eval().forward_features(x))
    return 'features equal'


@loader('transformers', 'AutoModelForImageClassification.from_pretrained(SOURCE), Trainer.train, save_model')
def transformers_trainer(folder: Path, source: str) -> str:
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    model = AutoModelForImageClassification.from_pretrained(source)
    before = [m.fc1.weight.detach().clone() for m in attention(model)]
    images, labels = dataset()
    rows = [dict(pixel_values=x, labels=y) for x, y in zip(images, labels, strict=True)]
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            max_steps=10,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy='no',
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        result = falls(row['loss'] for row in trainer.state.log_history if 'loss' in row)
        assert not any(torch.equal(m.fc1.weight, old) for m, old in zip(attention(model), before, strict=True))
        trainer.save_model(out)
        again = AutoModelForImageClassification.from_pretrained(out)
        equal(eager(again, images).logits, eager(model, images).logits)
        own = timm.create_model(f'local-dir:{out}', pretrained=True)
        equal(eager(own, images), eager(model, images).logits)
    return result + '; what it saves loads in transformers and timm'


# --- Training loops ---


@consumer('fastai', 'vision_learner(dls, model name).fit')
def fastai_learner(folder: Path) -> str:
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.vision.all import vision_learner

    rows = list(zip(*dataset(), strict=True))
    dls = DataLoaders(DataLoader(rows, bs=16), DataLoader(rows, bs=16))
    torch.manual_seed(0)
    learner = vision_learner(
        dls, NAME, n_out=CLASSES, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss(), metrics=[]
    )
    randomize(learner.model)
    assert len(attention(learner.model)) == 8
    with learner.no_bar(), learner.no_logging():
        learner.unfreeze()
        learner.fit(10, 1e-3)
    return falls(float(v) for v in learner.recorder.losses)


@consumer('lightning', 'Trainer.fit')
def lightning_trainer(folder: Path) -> str:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = build(), []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-3)

    classifier = Classifier()
    assert len(attention(classifier)) == 8
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*dataset()), batch_size=16)
    with tempfile.TemporaryDirectory() as out:
        lightning.Trainer(
            max_epochs=8,
            accelerator='cpu',
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=True,
            default_root_dir=out,
        ).fit(classifier, loader)
    return falls(classifier.losses)


@consumer('accelerate', 'Accelerator.prepare, backward')
def accelerate_training(folder: Path) -> str:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = build()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*dataset()), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-3), loader)
    losses = []
    for _ in range(8):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    assert all(m.fc1.weight.grad.abs().max() > 0 for m in attention(model))
    return falls(losses)


def _offloaded(name: str, offload: Callable[[nn.Module], nn.Module]) -> str:
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, num_classes=CLASSES)).eval()
    images, _ = dataset(4)
    expected = eager(model, images)
    model = offload(model)
    assert any(p.is_meta for m in model.modules() if hasattr(m, 'fc2') for p in m.parameters())
    equal(eager(model, images), expected)
    return 'logits equal'


@consumer('accelerate', 'cpu_offload')
def accelerate_offload(folder: Path) -> str:
    from accelerate import cpu_offload

    return _offloaded(NAME, lambda m: cpu_offload(m, torch.device('cpu')))


@consumer('accelerate', 'cpu_offload', 'senetv2_resnet50')
def accelerate_offload_bottleneck(folder: Path) -> str:
    from accelerate import cpu_offload

    return _offloaded('senetv2_resnet50', lambda m: cpu_offload(m, torch.device('cpu')))


@consumer('accelerate', 'disk_offload')
def accelerate_disk(folder: Path) -> str:
    from accelerate import disk_offload

    with tempfile.TemporaryDirectory() as out:
        return _offloaded(NAME, lambda m: disk_offload(m, out, torch.device('cpu')))


@consumer('peft', 'get_peft_model(LoRA on se.fc1, se.fc2 and the convs), merge_and_unload')
def peft_lora(folder: Path) -> str:
    from peft import LoraConfig, get_peft_model

    base = build()
    config = LoraConfig(r=4, target_modules=['fc1', 'fc2', 'conv1', 'conv2'], modules_to_save=['fc'])
    model = get_peft_model(base, config)
    images, labels = dataset()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any('.se.' in n and 'lora_' in n for n in trained) and any('conv2' in n for n in trained)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = [n for n, p in model.named_parameters() if n in trained and not torch.equal(p, trained[n])]
    assert sum('.se.' in n and 'lora_B' in n for n in moved) == 16, moved
    result = falls(losses)
    expected = eager(model, images)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(images), expected, rtol=1e-2)  # the adapters do something
    equal(eager(model.merge_and_unload(), images), expected)
    return result + ', merged logits equal'


# --- Looking inside ---


@consumer('grad-cam', 'GradCAM(model, [layer4[-1]])')
def gradcam(folder: Path) -> str:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, (images, _) = build().eval(), dataset(2)
    with GradCAM(model=model, target_layers=[model.layer4[-1]]) as cam:
        maps = cam(input_tensor=images, targets=[ClassifierOutputTarget(1)] * 2, eigen_smooth=False)
    features = model.forward_features(images)
    gradient = torch.autograd.grad(model.forward_head(features)[:, 1].sum(), features)[0]
    expected = F.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True))
    expected = F.interpolate(_unit(expected), (SIZE, SIZE), mode='bilinear')
    assert maps.max() > 0.5
    torch.testing.assert_close(torch.from_numpy(maps), _unit(expected)[:, 0].detach(), rtol=0, atol=1e-3)
    return 'maps equal'


def _unit(maps: Tensor) -> Tensor:
    """Each map from 0 to 1."""
    maps = maps - maps.amin((2, 3), keepdim=True)
    return maps / (maps.amax((2, 3), keepdim=True) + 1e-7)


@consumer('captum', 'IntegratedGradients.attribute, LayerActivation of se')
def captum_attribution(folder: Path) -> str:
    from captum.attr import IntegratedGradients, LayerActivation

    model, (images, _) = build().eval(), dataset(2)
    attribution, delta = IntegratedGradients(model).attribute(
        images, target=1, n_steps=100, internal_batch_size=20, return_convergence_delta=True
    )
    logits = eager(model, images)[:, 1] - eager(model, torch.zeros_like(images))[:, 1]
    # completeness: the attributions add up to the difference of the logits
    assert (attribution.sum((1, 2, 3)) - logits).abs().max() < 0.1 * logits.abs().max()
    se = model.layer4[-1].se
    kept = []
    handle = se.register_forward_hook(lambda m, i, o: kept.append(o.clone()))  # timm adds the shortcut in place
    eager(model, images)
    handle.remove()
    equal(LayerActivation(model, se).attribute(images), kept[0])
    return "attributions add up; se's activations equal"


@consumer('torchinfo', 'summary')
def torchinfo_summary(folder: Path) -> str:
    from torchinfo import summary

    model = build()
    found = summary(model, (1, 3, SIZE, SIZE), verbose=0, depth=4)
    assert found.total_params == sum(p.numel() for p in model.parameters())
    rows = [row for row in found.summary_list if row.class_name == 'SqueezeAggregatedExcitation']
    assert len(rows) == 8 and all(row.output_size for row in rows)
    return 'se in 8 rows with its output size'


@consumer('fvcore', 'FlopCountAnalysis')
def fvcore_flops(folder: Path) -> str:
    from fvcore.nn import FlopCountAnalysis

    model = build().eval()
    count = FlopCountAnalysis(model, torch.zeros(1, 3, SIZE, SIZE)).unsupported_ops_warnings(False)
    modules = count.by_module()
    for i, layer in enumerate(attention(model)):
        name = f'layer{i // 2 + 1}.{i % 2}.se'
        weights = layer.fc1.weight.numel() + layer.fc2.weight.numel()
        assert modules[f'{name}.fc1'] + modules[f'{name}.fc2'] == weights, name
    return f'{count.total():,} multiply-adds, those of se among them'


def main(name: str, folder: Path) -> None:
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    one = Consumer.every[name]
    found = dict(version=version(one.library))
    try:
        result = one.function(folder)
        found.update(result=result)
    except Exception as e:  # any failure is a result
        if 'TRACE' in os.environ:
            raise
        lines = [line for line in str(e).splitlines() if line.strip()] or ['']
        found.update(failure=f'{type(e).__name__}: {lines[0]}'[:300])
    print('RESULT', json.dumps(found), flush=True)


if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]))
