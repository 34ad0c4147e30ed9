"""timm_senetv2.gates and the command `timm-senetv2 gates`, beside numpy over gates recomputed from the weights."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.models import save_for_hf
from torch import nn

import timm_senetv2
from experiments.randomize import randomize
from timm_senetv2 import SqueezeAggregatedExcitation, gates, gates_report
from timm_senetv2.commands import main
from timm_senetv2.errors import UserError
from timm_senetv2.gates import attention_layers, measure
from timm_senetv2.gates_report import findings, report, write_report
from timm_senetv2.images import open_images, outputs_of

SHEET = Path(__file__).parent / 'data' / 'fashion_mnist.png'  # 28-pixel images, ten a row; row c is of class c
SHIPPED = 'cifar_senetv2_resnet20.fmnist'
LABELS = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')


def randomized(model: nn.Module) -> nn.Module:
    """In float64, with norms whose effect is seen, and gates that move."""
    randomize(model, torch.randn(8, 3, 32, 32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if '.se.' in name and name.endswith('weight'):
                parameter.mul_(3)
    return model.double().eval()


def batches(classes: int, images: int, size: int = 32, batch: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of unequal length, of images that differ by class, in float64."""
    labels = torch.randint(classes, (images,))
    patterns = torch.randn(classes, 3, size, size, dtype=torch.float64)
    x = 2 * patterns[labels] + torch.randn(images, 3, size, size, dtype=torch.float64)
    return list(zip(x.split(batch), labels.split(batch), strict=True))


def recomputed(model: nn.Module, loader) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Gates (N, C) and hidden units (N, H) of each SaE, by numpy from its input and weights; and the labels."""
    inputs: dict[str, list[np.ndarray]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, timm_senetv2.SqueezeAggregatedExcitation)}
    handles = [
        m.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].numpy()))
        for name, m in layers.items()
    ]
    with torch.no_grad():
        for x, _ in loader:
            model(x)
    for handle in handles:
        handle.remove()
    found, hidden = {}, {}
    for name, layer in layers.items():
        weights = {key: value.detach().numpy() for key, value in layer.named_parameters()}
        z = np.concatenate(inputs[name]).mean((2, 3))
        hidden[name] = np.maximum(z @ weights['fc1.weight'].T + weights['fc1.bias'], 0)
        found[name] = 1 / (1 + np.exp(-(hidden[name] @ weights['fc2.weight'].T + weights['fc2.bias'])))
    return found, hidden, np.concatenate([y.numpy() for _, y in loader])


@pytest.fixture(scope='module')
def case():
    """A model, its images, what `measure` says of them, and what numpy recomputes."""
    torch.manual_seed(0)
    model = randomized(timm.create_model('small_saecnn', sae_reduction=4))
    loader = batches(classes=4, images=61)
    measured = measure(model, loader, 'abcd', outputs=(3, 1, 0, 2))
    return model, loader, measured, recomputed(model, loader)


def test_gates_are_those_recomputed_from_the_weights(case):
    _, _, measured, (gates_of, _, labels) = case
    assert [layer.name for layer in measured.layers] == list(gates_of) and measured.images == 61
    for layer in measured.layers:
        s = gates_of[layer.name]
        assert s.std(0).max() > 0.02  # the gates move
        np.testing.assert_allclose(layer.mean, s.mean(0), rtol=1e-10)
        np.testing.assert_allclose(layer.std, s.std(0, ddof=1), rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(layer.low, s.min(0), rtol=1e-10)
        np.testing.assert_allclose(layer.high, s.max(0), rtol=1e-10)
        for k in range(4):
            np.testing.assert_allclose(layer.class_mean[k], s[labels == k].mean(0), rtol=1e-10)
            np.testing.assert_allclose(layer.class_std[k], s[labels == k].std(0, ddof=1), rtol=1e-9, atol=1e-13)
        assert layer.near_zero == pytest.approx((s < 0.05).mean())
        assert layer.near_one == pytest.approx((s > 0.95).mean())
        assert layer.constant == pytest.approx((s.std(0, ddof=1) < 0.01).mean())
        for q in (0.05, 0.5, 0.95):
            assert layer.quantile(q) == pytest.approx(np.quantile(s, q), abs=0.02)


def test_variance_within_and_between_classes_is_that_of_an_analysis_of_variance(case):
    _, _, measured, (gates_of, _, labels) = case
    kinds, counts = np.unique(labels, return_counts=True)
    n, k = len(labels), len(kinds)
    for layer in measured.layers:
        s = gates_of[layer.name]
        groups = [s[labels == kind] for kind in kinds]
        within = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups) / (n - k)
        np.testing.assert_allclose(layer.std_within, np.sqrt(within), rtol=1e-9, atol=1e-13)
        between = sum(len(g) * (g.mean(0) - s.mean(0)) ** 2 for g in groups) / (k - 1)
        n0 = (n - (counts**2).sum() / n) / (k - 1)
        component = ((between - within) / n0).sum()
        assert layer.between_share == pytest.approx(component / (component + within.sum()), rel=1e-9)


def test_share_between_classes_is_not_raised_by_few_images_a_class():
    torch.manual_seed(1)
    values = torch.randn(300, 5, dtype=torch.float64)
    labels = torch.arange(300) % 100  # three of each class, and the classes mean nothing
    moments = gates._ClassMoments(100, 5)
    moments.update(values, labels)
    within = moments.m2.sum(0) / 200
    share = gates._between_share(moments.count, moments.overall()[1], within)
    assert share is not None and share < 0.06  # the naive share of the sums of squares is about a third


def test_hidden_units_are_those_recomputed_from_the_weights(case):
    _, _, measured, (_, hidden, _) = case
    seen = 0
    for layer in measured.layers:
        h, units = hidden[layer.name], layer.units
        np.testing.assert_allclose(units.mean, h.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(units.fires, (h > 0).mean(0))
        assert units.never_fire == (h.max(0) <= 0).sum()
        alive = h.std(0) > 0
        assert (np.isnan(np.diag(units.correlation)) == ~alive).all()
        expected = np.corrcoef(h[:, alive].T)
        np.testing.assert_allclose(units.correlation.numpy()[np.ix_(alive, alive)], expected, atol=1e-9)
        branch = np.arange(h.shape[1]) // (h.shape[1] // 4)
        pairs = [(i, j) for i in np.flatnonzero(alive) for j in np.flatnonzero(alive) if i < j]
        strength = {p: abs(np.corrcoef(h[:, p[0]], h[:, p[1]])[0, 1]) for p in pairs}
        within = [r for (i, j), r in strength.items() if branch[i] == branch[j]]
        between = [r for (i, j), r in strength.items() if branch[i] != branch[j]]
        if within and between:
            seen += 1
            assert units.within == pytest.approx(np.mean(within)) and units.between == pytest.approx(np.mean(between))
            assert units.chance[0] < 0 < units.chance[1]
    assert seen


def test_units_that_belong_together_lie_outside_the_range_of_chance():
    torch.manual_seed(0)
    signals = torch.randn(500, 4, dtype=torch.float64)
    alike = signals.repeat_interleave(4, 1) + 0.3 * torch.randn(500, 16, dtype=torch.float64)
    units = gates._Units(16)
    units.update(alike)
    grouped = units.summary(4)
    assert grouped.within - grouped.between > 0.5 > grouped.chance[1]
    shuffled = gates._Units(16)
    shuffled.update(alike[:, torch.randperm(16)])
    other = shuffled.summary(4)
    assert other.chance[0] <= other.within - other.between <= other.chance[1]


def test_unit_that_never_fires_is_counted():
    model = randomized(timm.create_model('small_saecnn', sae_reduction=4))
    loader = batches(2, 9)
    before = measure(model, loader, 'ab', effect_images=0).layers[1].units
    alive = before.fires.nonzero()[:2, 0]
    with torch.no_grad():
        model.layer2.se.fc1.bias[alive] = -1e6
    after = measure(model, loader, 'ab', effect_images=0).layers[1].units
    assert after.never_fire == before.never_fire + 2
    assert after.correlation[alive].isnan().all()


def test_unit_that_works_below_zero_is_not_one_that_never_fires():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        SqueezeAggregatedExcitation(8, rd_channels=4, act_layer=torch.nn.SiLU),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    torch.nn.init.constant_(model[1].fc1.bias, -1.0)
    units = measure(model, batches(2, 9), 'ab', effect_images=0).layers[0].units
    assert (units.mean < 0).any() and units.never_fire == 0


def test_effect_of_mean_gates_is_that_of_weights_that_give_them(case):
    model, loader, measured, (gates_of, _, labels) = case
    x = torch.cat([x for x, _ in loader])
    right = np.array((3, 1, 0, 2))[labels]
    with torch.no_grad():
        plain = model(x)
    assert measured.accuracy == pytest.approx(100 * (plain.argmax(1).numpy() == right).mean())

    def with_mean_gates(names: list[str]) -> torch.Tensor:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            for name in names:  # the second dense layer ignores the image: sigmoid(bias) is the mean
                mean = torch.from_numpy(gates_of[name].mean(0))
                model.get_submodule(name).fc2.weight.zero_()
                model.get_submodule(name).fc2.bias.copy_(mean.logit())
            out = model(x)
        model.load_state_dict(state)
        return out

    names = list(gates_of)
    for effect, replaced in (
        *((layer.effect, [layer.name]) for layer in measured.layers),
        (measured.all_layers, names),
    ):
        out = with_mean_gates(replaced)
        assert not torch.allclose(out, plain)
        assert effect.output_change == pytest.approx(float((out - plain).abs().mean()), rel=1e-8)
        assert effect.output_std == pytest.approx(float(plain.std(0).mean()), rel=1e-9)
        assert effect.predictions_changed == pytest.approx(float((out.argmax(1) != plain.argmax(1)).double().mean()))
        accuracy = 100 * (out.argmax(1).numpy() == right).mean()
        assert effect.accuracy == pytest.approx(accuracy)
        assert effect.change == pytest.approx(accuracy - measured.accuracy)
        assert effect.interval[0] < effect.change < effect.interval[1]


def test_interval_covers_the_true_change_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):  # 3 % of the images gained, 5 % lost: the true change is -2 points
        gained, lost, _ = rng.multinomial(400, (0.03, 0.05, 0.92))
        low, high = gates._paired_interval(gained, lost, 400)
        covered += low <= -2 <= high
    assert 0.93 < covered / 2000 < 0.98


def test_model_is_the_same_afterwards(case):
    model = timm.create_model('cifar_senetv2_resnet20')
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match='class indices'):
        measure(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 5]))], 'ab')
    measure(model, batches(2, 5), 'ab')
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_gates_of_fused_blocks_are_read_and_replaced():
    model = timm.create_model('cifar_senetv2_resnet20')
    randomize(model, torch.randn(8, 3, 32, 32))
    x, y = torch.randn(40, 3, 32, 32), torch.arange(40) % 2  # enough pixels for the fused tail
    fused = measure(model, [(x, y)], 'ab')
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules()]  # now timm's own forward runs
    plain = measure(model, [(x, y)], 'ab')
    for handle in handles:
        handle.remove()
    for ours, timms in zip(fused.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.mean, timms.mean, rtol=1e-4, atol=1e-5)
        assert timms.effect.output_change > 0
        assert ours.effect.output_change == pytest.approx(timms.effect.output_change, rel=1e-2)


@pytest.mark.parametrize(
    'name, kind, build',
    [
        ('small_secnn', 'SE', timm.create_model),
        ('regnety_002', 'SE', timm.create_model),
        ('mobilenetv3_small_050', 'SE', timm.create_model),
        ('legacy_seresnet18', 'SE', timm.create_model),
        ('ese_vovnet19b_slim_dw', 'eSE', timm.create_model),
        ('ecaresnet26t', 'ECA', timm.create_model),
        ('mobilenetv3_small_050', 'SaE', lambda name: timm_senetv2.lift(timm.create_model(name))),
        ('resnet18', 'SaE', lambda name: timm_senetv2.add_attention(timm.create_model(name))),
        ('resnet18', 'SaE', lambda name: timm_senetv2.add_attention(torchvision.models.resnet18())),
        ('mobilenet_v3_small', 'SE', lambda name: torchvision.models.mobilenet_v3_small()),
    ],
)
def test_attention_of_others_is_measured(name, kind, build):
    model = build(name)
    layers = attention_layers(model)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(layer.name).register_forward_hook(
            lambda m, x, y, name=layer.name: seen.__setitem__(name, (y / x[0]).detach())
        )
        for layer in layers
    ]
    x = torch.rand(3, 3, 64, 64) + 0.1
    randomize(model, x)(x)  # timm zeroes the last norm of a branch: then nothing goes into its attention
    for handle in handles:
        handle.remove()
    measured = measure(model, [(x, torch.tensor([0, 1, 1]))], 'ab', effect_images=0)
    assert [layer.name for layer in measured.layers] == list(seen) and len(seen) == len(layers)
    assert {layer.kind for layer in measured.layers} == {kind}
    assert measured.all_layers is None and measured.layers[0].effect is None
    for layer in measured.layers:  # what comes out over what goes in, where that is not 0 / 0
        ratio = seen[layer.name]
        pixel = ratio.isfinite().all(0).flatten(1).float().argmax(1)
        expected = ratio.flatten(2)[:, torch.arange(len(pixel)), pixel].double().mean(0)
        kept = expected.isfinite()
        assert kept.any()
        torch.testing.assert_close(layer.mean[kept], expected[kept], rtol=1e-3, atol=1e-4)
        assert (layer.units is None) == (kind in ('eSE', 'ECA'))


def test_what_cannot_be_measured_is_said():
    model = timm.create_model('small_saecnn')
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match='no channel attention'):
        measure(timm.create_model('small_cnn'), [(x, y)], 'ab')
    with pytest.raises(ValueError, match='one image says nothing'):
        measure(model, [(x[:1], y[:1])], 'ab')
    with pytest.raises(ValueError, match='gives no images'):
        measure(model, [], 'ab')
    with pytest.raises(ValueError, match='layer1.se has gates or hidden units that are not finite'):
        measure(model, [(x * float('nan'), y)], 'ab')
    with pytest.raises(ValueError, match='outputs must be from 0 to 9'):
        measure(model, [(x, y)], 'ab', outputs=(0, 10))
    with pytest.raises(ValueError, match='must put out'):
        measure(timm.create_model('small_saecnn', features_only=True), [(x, y)], 'ab')


def test_layer_that_is_called_twice_in_a_pass_is_refused():
    model = timm.create_model('small_saecnn')
    layer = dict(model.named_modules())['layer1.se']
    forward = layer.forward
    layer.forward = lambda x: forward(forward(x))
    with pytest.raises(ValueError, match='layer1.se is called twice for an image'):
        measure(model, [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))], 'ab')


def test_one_class_and_one_image_a_class_leave_out_what_they_cannot_say():
    model = timm.create_model('small_saecnn')
    one = measure(model, batches(1, 6), 'a')
    assert all(layer.between_share is None for layer in one.layers)
    each = measure(model, [(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2]))], 'abcd')
    assert all(layer.between_share is None and layer.std_within.isnan().all() for layer in each.layers)
    assert each.layers[0].class_std.isnan().all() and each.layers[0].class_mean[3].isnan().all()
    assert any('Nothing can be said about differences between classes' in text for text in findings(each))


# The command


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """Ten images of each of the ten classes of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp('photos')
    sheet = Image.open(SHEET)
    for c, name in enumerate(LABELS):
        (folder / name.replace('/', ' ')).mkdir()
        for i in range(10):
            tile = sheet.crop((28 * i, 28 * c, 28 * i + 28, 28 * c + 28))
            tile.save(folder / name.replace('/', ' ') / f'{i}.png')
    return folder


def exit_of(argv, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(['gates', *map(str, argv)])
    return done.value.code or 0, *capsys.readouterr()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_command_writes_report_pictures_and_numbers(photos, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    out = tmp_path / 'out'
    code, told, err = exit_of([SHIPPED, '--data', photos, '--out', out, '--classes', 'Coat', 'Shirt'], capsys)
    assert code == 0, err
    text = (out / 'report.md').read_text()
    assert told.startswith(text) and told.endswith(f'wrote {out}\n')
    names = {path.name for path in out.iterdir()}
    pictures = {'overview.png', 'classes.png', 'within_class.png', 'units.png'}
    tables = {f'{name}.csv' for name in ('layers', 'effects', 'channels', 'classes', 'histogram', 'units')}
    assert names == {'report.md', 'settings.json', '.timm-senetv2.json', *pictures, *tables}
    for name in pictures:
        assert f']({name})' in text
        with Image.open(out / name) as picture:
            assert picture.width > 500 and len(picture.convert('RGB').getcolors(1 << 24)) > 50

    images = open_images(photos)
    model = timm.create_model(SHIPPED, pretrained=True)
    images.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x, y = zip(*(images[i] for i in range(len(images))), strict=True)
    loader = [(torch.stack(x), torch.tensor(y))]
    measured = measure(model, loader, images.classes, outputs_of(model, images)[0])
    assert json.loads((out / 'settings.json').read_text())['accuracy'] == measured.accuracy > 80
    rows = read(out / 'layers.csv')
    assert [row['layer'] for row in rows] == [layer.name for layer in measured.layers] and len(rows) == 9
    for row, layer in zip(rows, measured.layers, strict=True):
        assert float(row['mean']) == pytest.approx(float(layer.mean.mean()), rel=1e-3)
        assert float(row['variance_between_classes']) == pytest.approx(layer.between_share, rel=1e-2)
        assert float(row['near_0']) == layer.near_zero and int(row['never_fire']) == layer.units.never_fire
    effects = read(out / 'effects.csv')
    assert effects[-1]['layer'] == '(all layers)' and len(effects) == 10
    assert float(effects[-1]['output_change']) == pytest.approx(measured.all_layers.output_change, rel=1e-2)
    assert len(read(out / 'channels.csv')) == 3 * (16 + 32 + 64)
    drawn = read(out / 'classes.csv')
    assert {row['class_name'] for row in drawn} == {'Coat', 'Shirt'}
    coat = images.classes.index('Coat')
    assert float(drawn[0]['mean']) == pytest.approx(float(measured.layers[0].class_mean[coat, 0]), rel=1e-3)


def test_overlays_are_class_activation_maps_with_own_and_mean_gates(tmp_path):
    pytest.importorskip('pytorch_grad_cam')
    from timm_senetv2.gates_plots import write_overlays
    from timm_senetv2.overlays import overlays

    model = timm.create_model(SHIPPED, pretrained=True).eval()
    image = torch.randn(3, 32, 32)
    means = {layer.name: torch.full((layer_width(model, layer.name),), 0.2) for layer in attention_layers(model)}
    [made] = overlays(model, [(image, 'x')], means, LABELS)
    kept = {}
    handle = model.layer3[2].register_forward_hook(lambda m, x, y: kept.update(y=y))
    out = model(image[None])
    handle.remove()
    best = int(out.argmax())
    [grad] = torch.autograd.grad(out[0, best], kept['y'])
    cam = (grad.mean((2, 3), keepdim=True) * kept['y']).sum(1).relu()[0].detach()
    small = torch.nn.functional.interpolate(made.own.map[None, None], size=cam.shape, mode='area')[0, 0]
    assert made.own.predicted == LABELS[best]
    assert made.own.probability == pytest.approx(float(out.detach().softmax(1)[0, best]), rel=1e-4)
    assert np.corrcoef(small.flatten(), cam.flatten())[0, 1] > 0.9
    assert not torch.allclose(made.own.map, made.fixed.map)
    assert not any(m._forward_hooks for m in model.modules())
    write_overlays(tmp_path, [made], 'title')
    with Image.open(tmp_path / 'overlays.png') as picture:
        assert len(picture.convert('RGB').getcolors(1 << 24)) > 256


def layer_width(model: nn.Module, name: str) -> int:
    return model.get_submodule(name).channels


def test_images_take_turns_evenly_over_classes(photos):
    images = open_images(photos, limit=30)
    assert len(images) == 30 and len(images.classes) == 3  # so many that each has ten, all that there are
    labels = [images[i][1] for i in range(30)]
    assert labels == [0, 1, 2] * 10
    assert images.classes[0] == images.all_classes[0] and images.classes[-1] == images.all_classes[-1]
    wanted = open_images(photos, limit=30, wanted=['Bag', 'Coat'])
    assert len(wanted) == 30 and {'Bag', 'Coat'} < set(wanted.classes) and len(wanted.classes) == 3


@pytest.mark.parametrize('limit, classes', [(2, 2), (15, 2), (25, 3), (100, 10)])
def test_few_images_are_of_two_classes_or_more(photos, limit, classes):
    images = open_images(photos, limit=limit)
    assert (len(images), len(images.classes)) == (limit, classes)


def test_right_outputs_are_found_by_name_else_by_order(photos, tmp_path):
    model = timm.create_model(SHIPPED, pretrained=True)
    images = open_images(photos)
    assert images.classes[0] == 'Ankle boot'  # timm sorts the folders, and the model's labels are in another order
    outputs, how = outputs_of(model, images)
    assert [LABELS[i].replace('/', ' ') for i in outputs] == list(images.classes) and 'its name' in how
    for i, name in enumerate(('c', 'a', 'b')):
        (tmp_path / name).mkdir()
        Image.new('RGB', (8, 8), (90 * i, 0, 0)).save(tmp_path / name / 'x.png')
    others = open_images(tmp_path)
    outputs, how = outputs_of(model, others)
    assert outputs is None and "no output named 'a' and 2 others" in how
    outputs, how = outputs_of(timm.create_model('small_saecnn', num_classes=3), others)
    assert outputs == [0, 1, 2] and 'by the order of the classes' in how
    outputs, how = outputs_of(timm.create_model('small_saecnn', num_classes=4), others)
    assert outputs is None and 'its 4 outputs have no names' in how


def test_one_class_of_another_name_leaves_the_accuracy_unknown(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(gates_report, 'write_pictures', lambda *_: [])  # which take seconds
    shutil.copytree(photos, tmp_path / 'photos')
    (tmp_path / 'photos' / 'T-shirt top').rename(tmp_path / 'photos' / 'T-shirt')
    text = write_report(SHIPPED, tmp_path / 'photos', tmp_path / 'out', effect_images=0)
    assert "it has no output named 'T-shirt'; folders that are named as its labels would tell" in text
    assert 'The model is right' not in text


def test_part_of_a_folder_is_found_or_asked_for(photos, tmp_path):
    for part, classes in (('train', ('Bag', 'Coat', 'Dress')), ('test', ('Bag', 'Coat'))):
        for name in classes:
            shutil.copytree(photos / name, tmp_path / part / name)
    assert len(open_images(tmp_path)) == len(open_images(tmp_path, split='test')) == 20
    assert len(open_images(tmp_path, split='training')) == 30
    with pytest.raises(UserError, match='has train, test and no validtion; --split says which .*: train, test$'):
        open_images(tmp_path, split='validtion')
    shutil.copytree(photos / 'Coat', tmp_path / 'mine' / 'Coat')
    assert len(open_images(tmp_path, split='mine')) == 10
    shutil.copytree(photos / 'Bag', tmp_path / 'val' / 'Bag')
    assert len(open_images(tmp_path)) == 10
    shutil.rmtree(tmp_path / 'test')
    shutil.rmtree(tmp_path / 'val')
    with pytest.raises(UserError, match='has train and no validation'):
        open_images(tmp_path)
    with pytest.raises(UserError, match='has no parts and no tset; .*leave it out'):
        open_images(photos, split='tset')
    shutil.copytree(photos / 'Coat', tmp_path / 'vehicles' / 'train')  # a class
    shutil.copytree(photos / 'Bag', tmp_path / 'vehicles' / 'bus')
    assert open_images(tmp_path / 'vehicles').classes == ('bus', 'train')


def test_images_of_every_format_and_depth_are_read_alike(photos, tmp_path):
    names = ('0.png', '0.webp', '0.bmp', '0.gif', '0.tif', '16.png', '0.TIFF')
    (tmp_path / 'Coat').mkdir()
    grey = np.asarray(Image.open(photos / 'Coat' / '3.png').convert('L'))
    for name in names:
        image = Image.fromarray(grey.astype(np.uint16) * 257) if name == '16.png' else Image.fromarray(grey)
        image.save(tmp_path / 'Coat' / name, **(dict(lossless=True) if name.endswith('webp') else {}))
    images = open_images(tmp_path)
    assert len(images) == len(names)
    for i in range(len(names)):
        assert (np.asarray(images[i][0])[..., 0] == grey).all()


def test_data_set_of_torchvision(tmp_path):
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    pixels = np.arange(30 * 28 * 28, dtype=np.uint8)
    for part in ('train', 't10k'):
        (raw / f'{part}-images-idx3-ubyte').write_bytes(
            b''.join(int(n).to_bytes(4, 'big') for n in (2051, 30, 28, 28)) + pixels.tobytes()
        )
        labels = bytes(range(10)) * 3
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(
            b''.join(int(n).to_bytes(4, 'big') for n in (2049, 30)) + labels
        )
    images = open_images(tmp_path, 'torch/fashion_mnist')
    assert len(images) == 30 and images.classes == LABELS
    image, label = images[11]
    assert (label, image.mode) == (1, 'RGB')
    assert (np.asarray(image)[..., 0] == pixels.reshape(30, 28, 28)[11]).all()
    assert outputs_of(timm.create_model(SHIPPED, pretrained=True), images)[0] == list(range(10))
    with pytest.raises(UserError, match="--split must be train, validation or test, got 'banana'"):
        open_images(tmp_path, 'torch/fashion_mnist', split='banana')


def broken(photos: Path, tmp_path: Path, what: str) -> Path:
    """A folder of images with something wrong."""
    folder = tmp_path / what
    if what == 'flat':
        shutil.copytree(photos / 'Coat', folder)
    elif what == 'empty':
        (folder / 'a').mkdir(parents=True)
    elif what == 'single':
        (folder / 'a').mkdir(parents=True)
        shutil.copy(photos / 'Coat' / '0.png', folder / 'a')
    elif what == 'damaged':
        shutil.copytree(photos, folder)
        (folder / 'Coat' / '3.png').write_bytes((photos / 'Coat' / '3.png').read_bytes()[:80])
    return folder


@pytest.mark.parametrize(
    'what, says',
    [
        ('missing', 'is not a folder'),
        ('flat', 'without a class'),
        ('empty', 'holds no images'),
        ('single', 'one image says nothing'),
        ('damaged', r'Coat/3.png cannot be read as an image'),
    ],
)
def test_unusable_images_are_one_line(photos, tmp_path, capsys, what, says):
    folder = broken(photos, tmp_path, what)
    code, out, err = exit_of([SHIPPED, '--data', folder, '--out', tmp_path / 'out'], capsys)
    assert (code, out) == (2, '') and says in err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.timm*'))


def test_damaged_image_in_a_loading_process_is_one_line(photos, tmp_path, capsys):
    folder = broken(photos, tmp_path, 'damaged')
    for name in LABELS:
        for i in range(10, 25):
            place = folder / name.replace('/', ' ')
            shutil.copy(place / f'{i % 3}.png', place / f'{i}.png')
    code, _, err = exit_of([SHIPPED, '--data', folder, '-j', 1, '--out', tmp_path / 'out'], capsys)
    assert code == 2 and 'Coat/3.png cannot be read' in err and err.count('\n') == 1


@pytest.mark.parametrize(
    'argv, says',
    [
        (['cifar_resnet20.fmnist'], 'has no channel attention'),
        (['cifar_senetv2_resnet2O'], '; did you mean cifar_senetv2_resnet'),
        (['cifar_senetv2_resnet20.nope'], 'cannot be loaded'),
        (['small_saecnn'], 'cannot be loaded'),
        (['local-dir:nothing'], 'cannot be loaded'),
        (['me/mine'], 'write local-dir:DIR'),
        ([SHIPPED, '--classes', 'Coat', 'Hat'], "no class 'Hat'"),
        ([SHIPPED, '--classes', *'abcdefgh'], 'at most 7'),
        ([SHIPPED, '--images', '1'], 'must be 2 or more'),
        ([SHIPPED, '--images', 'many'], 'invalid int'),
        ([SHIPPED, '--dataset', 'torch/nope'], 'Unknown torchvision dataset'),
        ([SHIPPED, '--dataset', 'hfds/x'], "takes 'torch/NAME'"),
        ([SHIPPED, '--dataset', 'torch/cifar10'], '--dataset-download downloads it'),
        ([SHIPPED, '--device', 'cuda:99'], f'error: {SHIPPED}: '),
        ([SHIPPED, '--device', 'toaster'], 'toaster'),
    ],
)
def test_mistake_is_one_line(photos, tmp_path, capsys, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = exit_of([*argv, '--data', photos, '--out', 'out'], capsys)
    assert (code, out) == (2, '') and says in err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_folder_of_others_is_kept(photos, tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('mine')
    code, _, err = exit_of([SHIPPED, '--data', photos, '--out', tmp_path / 'out'], capsys)
    assert code == 2 and 'was not written by gates' in err and err.count('\n') == 1
    assert (tmp_path / 'out' / 'mine.txt').read_text() == 'mine'


def test_weights_that_are_not_finite_are_one_line(photos, tmp_path, capsys):
    model = timm.create_model('cifar_senetv2_resnet20', num_classes=10)
    with torch.no_grad():
        model.layer2[0].se.fc2.bias[0] = float('nan')
    save_for_hf(model, tmp_path / 'nan', safe_serialization=True)
    code, _, err = exit_of([f'local-dir:{tmp_path / "nan"}', '--data', photos, '--out', tmp_path / 'out'], capsys)
    assert code == 2 and 'layer2.0.se has gates or hidden units that are not finite' in err and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('package, argv', [('matplotlib', []), ('pytorch_grad_cam', ['--overlay', '2'])])
def test_missing_package_is_one_line(photos, tmp_path, capsys, monkeypatch, package, argv):
    from timm_senetv2 import commands

    find = commands.find_spec
    monkeypatch.setattr(commands, 'find_spec', lambda name: None if name == package else find(name))
    code, _, err = exit_of([SHIPPED, '--data', photos, '--out', tmp_path / 'out', *argv], capsys)
    assert code == 2 and package in err and "pip install 'timm-senetv2[gates]'" in err and err.count('\n') == 1


def test_odd_names_of_classes_are_drawn_and_written_as_text(tmp_path):
    pytest.importorskip('matplotlib')
    for name in ('$x_{1}', 'a|b`c*', 'ü' * 60):
        (tmp_path / 'd' / name).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((20, 30), 60 + i).save(tmp_path / 'd' / name / f'{i}.png')
    save_for_hf(timm.create_model('small_saecnn', num_classes=5), tmp_path / 'm', safe_serialization=True)
    text = write_report(f'local-dir:{tmp_path / "m"}', tmp_path / 'd', tmp_path / 'out', effect_images=6)
    assert 'The accuracy is not known' in text
    assert {row['class_name'] for row in read(tmp_path / 'out' / 'classes.csv')} == {'$x_{1}', 'a|b`c*', 'ü' * 60}


def test_report_says_what_the_numbers_say(case):
    _, _, measured, _ = case
    settings = dict(classes_of_the_data=9, timm_senetv2='1', timm='2', torch='3')
    text = report(measured, 'a|b', settings, [], 'Known by name.')
    assert '- Known by name.\n' in text
    assert '# What the attention does: a\\|b' in text and 'of 4 of 9 classes' in text
    assert f'changes by {measured.all_layers.change:+.2f} points' in text
    dead = sum(layer.units.never_fire for layer in measured.layers)
    assert f'{dead} of {sum(len(layer.units.mean) for layer in measured.layers)} hidden units never fire' in text
    constant = sum(round(layer.constant * len(layer.mean)) for layer in measured.layers)
    assert f'{constant} of {sum(len(layer.mean) for layer in measured.layers)} channels have a constant gate' in text


@pytest.mark.parametrize(
    'shares, says',
    [
        ([0.0] * 6, '0.0 % of the variance of a gate lies between classes, in every block.'),
        ([0.0] * 8 + [0.5], 'With depth, gates become neither clearly more nor clearly less specific to the class'),
        ([0.0, 0.0, 0.1, 0.2, 0.3, 0.4], 'With depth, gates become more specific to the class'),
    ],
)
def test_blocks_with_equal_shares_have_no_order(case, shares, says):
    _, _, measured, _ = case
    layers = [dataclasses.replace(measured.layers[0], name=f'b{i}.se', between_share=s) for i, s in enumerate(shares)]
    text = report(
        dataclasses.replace(measured, layers=layers),
        'a',
        dict(classes_of_the_data=4, timm_senetv2='1', timm='2', torch='3'),
        [],
        '',
    )
    assert says in text
    if len(set(shares)) > 1:
        rho = pytest.importorskip('scipy.stats').spearmanr(shares, range(len(shares))).statistic
        assert f'{rho:+.2f}' in text
