"""Runs that start from trained weights, against what is computed by hand from the same weights."""

import csv
import importlib.util
from pathlib import Path

import pytest
import reproduce
import timm
import torch

import timm_senetv2
from experiments.batches import Batches
from experiments.data import load_dataset
from experiments.settings import Settings, make_settings, parse_specs
from experiments.training import evaluate, make_optimizer, train
from experiments.warm_start import (
    FreshUnits,
    attention,
    build,
    freeze_all_but_attention,
    fresh_units,
    load_source,
    set_training,
)
from timm_senetv2 import SqueezeAggregatedExcitation
from timm_senetv2.errors import UserError

SE, PLAIN = 'cifar_seresnet20.fmnist', 'cifar_resnet20.fmnist'
DIGITS = ['--dataset', 'digits', '--image-size', '8', '--crop-padding', '1', '--batch-size', '16', '--device', 'cpu']

needs_add_attention = pytest.mark.skipif(
    not hasattr(timm_senetv2, 'add_attention'), reason='this package has no add_attention yet'
)


def spec(word: str):
    (one,) = parse_specs(word)
    return one


def small_settings(*arguments: str) -> Settings:
    args = reproduce.parse_args([*DIGITS, '--models', 'small_cnn', '--epochs', '1', '--out', 'x', *arguments])
    return make_settings(vars(args))


def logits(model: torch.nn.Module) -> torch.Tensor:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        return model.double().eval()(images)


def test_continue_starts_at_the_source():
    model = build(spec('cifar_seresnet20@continue'), 10, load_source(SE))
    expected = timm.create_model('cifar_seresnet20', pretrained=True)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)


@pytest.mark.parametrize('word', ['cifar_senetv2_resnet20@lift', 'cifar_seresnet20:sae_reduction=4@lift'])
def test_lift_starts_at_the_function_of_the_source_with_fresh_units(word):
    source = load_source(SE)
    model = build(spec(word), 10, source)
    expected = logits(timm.create_model('cifar_seresnet20', pretrained=True))
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    hidden = {name: layer.fc1.out_features for name, layer in attention(model)}
    assert len(hidden) == 9
    assert fresh_units(model, source) == {name: units // 4 for name, units in hidden.items()}
    layer = model.layer3[2].se
    assert layer.fc2.weight[:, 4:].eq(0).all() and layer.fc1.weight[4:].abs().min() > 0


def test_a_classifier_for_other_classes_is_new_and_depends_on_the_seed():
    source = load_source(SE)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build(spec('cifar_seresnet20@continue'), 3, source))
    first, again, other = (model.fc.weight for model in models)
    assert first.shape == (3, 64) and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(models[0].layer1[0].conv1.weight, source.state_dict['layer1.0.conv1.weight'])


@needs_add_attention
def test_add_attention_starts_at_the_function_of_the_source():
    model = build(spec('cifar_resnet20@add_attention:reduction=16,cardinality=4'), 10, load_source(PLAIN))
    assert sum(isinstance(m, SqueezeAggregatedExcitation) for m in model.modules()) == 9
    torch.testing.assert_close(
        logits(model), logits(timm.create_model('cifar_resnet20', pretrained=True)), rtol=0, atol=0
    )


def test_kept_weights_are_tested_as_they_are(tmp_path):
    arguments = [*DIGITS, '--limit', '40', '--epochs', '3', '--init', SE, '--seeds', '0', '1', '--out', str(tmp_path)]
    reproduce.main([*arguments, '--save-weights', '--models', 'cifar_seresnet20@keep', 'cifar_seresnet20@continue'])
    with (tmp_path / 'results.csv').open(newline='') as file:
        kept = [row for row in csv.DictReader(file) if row['model'] == 'cifar_seresnet20@keep']
    data = load_dataset('digits', limit=40)
    batches = Batches(data, small_settings(), 0)
    model = timm.create_model('cifar_seresnet20', pretrained=True)
    loss, accuracy = evaluate(model, batches.of(model)[1].batches(0))
    assert [(float(row['accuracy']), float(row['loss'])) for row in kept] == [
        (pytest.approx(accuracy, abs=1e-3), pytest.approx(loss, abs=1e-5))
    ] * 2
    assert (tmp_path / 'weights' / kept[0]['run']).is_dir()
    assert load_source(str(tmp_path / 'weights' / kept[0]['run'])).sha256 == load_source(SE).sha256
    with pytest.raises(UserError, match='tell 10 classes apart, and there are 3'):
        build(spec('cifar_seresnet20@keep'), 3, load_source(SE))


def test_source_is_named_by_its_weights_not_by_its_place(tmp_path):
    from experiments.warm_start import save

    source = load_source(SE)
    model = timm.create_model('cifar_seresnet20', pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    save(model, tmp_path / 'copy', tuple('abcdefghij'), config)
    copy = load_source(str(tmp_path / 'copy'))
    assert (copy.sha256, copy.architecture, copy.num_classes) == (source.sha256, 'cifar_seresnet20', 10)
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    save(model, tmp_path / 'other', tuple('abcdefghij'), config)
    assert load_source(str(tmp_path / 'other')).sha256 != source.sha256


@pytest.mark.parametrize(
    'word, init, says',
    [
        ('cifar_seresnet20@continue', None, 'say which by --init'),
        ('cifar_resnet20@continue', SE, 'from the weights of --init, of cifar_seresnet20: '),
        ('cifar_seresnet20@continue', PLAIN, 'layer1.0.se.fc1.weight is missing'),
        ('cifar_seresnet32@continue', SE, 'layer1.3.se.fc1.weight is missing'),
        ('cifar_seresnet20:widths=[8,16,32]@continue', SE, 'cifar_seresnet20:widths=[8,16,32]@continue'),
        ('cifar_seresnet20@lift', SE, 'there is nothing to lift'),
        ('cifar_senetv2_resnet20@lift', PLAIN, 'cifar_senetv2_resnet20@lift'),
        ('cifar_resnet20@lift', SE, 'cifar_resnet20@lift'),
        ('cifar_seresnet20@continue', 'nowhere', '--init nowhere cannot be loaded'),
    ],
)
def test_weights_that_do_not_fit_are_one_line_before_any_training(tmp_path, monkeypatch, word, init, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        reproduce.main([*DIGITS, '--models', word, *(['--init', init] if init else []), '--out', 'out'])
    assert says in str(error.value) and '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'word, says',
    [
        ('small_cnn@loft', 'a model starts by one of scratch, keep, continue, lift, add_attention'),
        ('small_cnn@scratch:epochs=0', 'epochs must be a whole number of at least 1'),
        ('small_cnn@scratch:lr=0', 'lr must be a number above 0'),
        ('small_cnn@scratch:lr=nan', 'lr must be a number above 0'),
        ('small_cnn@scratch:fresh_lr=2', "takes epochs, lr, attention_lr, train_only, got 'fresh_lr'"),
        ('small_cnn@scratch:epoch=2', 'did you mean epochs'),
        ('small_cnn@scratch:train_only=head', 'train_only must be one of attention'),
        ('small_cnn@scratch:lr=1,lr=2', 'gives lr twice'),
    ],
)
def test_a_word_that_says_no_start_is_one_line(word, says):
    with pytest.raises(UserError) as error:
        parse_specs(word)
    assert says in str(error.value)


def test_words_expand_and_an_old_name_is_its_new_one():
    assert [str(s) for s in parse_specs('senetv2_resnet20:sae_reduction=8@lift:fresh_lr=1|10')] == [
        'cifar_senetv2_resnet20:sae_reduction=8@lift:fresh_lr=1',
        'cifar_senetv2_resnet20:sae_reduction=8@lift:fresh_lr=10',
    ]
    assert str(spec('small_cnn@scratch')) == 'small_cnn'


def test_only_the_attention_trains_and_frozen_norms_keep_their_statistics():
    source = load_source(SE)
    torch.manual_seed(0)
    model = build(spec('cifar_senetv2_resnet20@lift'), 10, source)
    freeze_all_but_attention(model, source)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_training(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    torch.nn.functional.cross_entropy(model(torch.rand(8, 3, 32, 32)), torch.arange(8)).backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all('.se.' in key for key in changed)
    with pytest.raises(ValueError, match='no attention'):
        freeze_all_but_attention(timm.create_model('cifar_resnet20'), None)


def test_a_multiple_of_the_learning_rate_is_that_of_the_attention_alone():
    model = timm.create_model('cifar_senetv2_resnet20')
    ours = {id(p) for name, p in model.named_parameters() if '.se.' in name}
    assert len(ours) == 4 * 9
    chosen = small_settings('--epochs', '10', '--batch-size', '64')
    plain, plain_schedule = make_optimizer(model, chosen, updates=10)
    scaled, schedule = make_optimizer(model, chosen, updates=10, attention_lr=10.0)

    def rates(optimizer):
        return {id(p): (g['lr'], g['weight_decay']) for g in optimizer.param_groups for p in g['params']}

    for update in (0, 5, 20, 99):
        plain_schedule.step_update(update)
        schedule.step_update(update)
        expected = rates(plain)
        for parameter, (rate, decay) in rates(scaled).items():
            factor = 10 if parameter in ours else 1
            assert (rate, decay) == (pytest.approx(factor * expected[parameter][0]), expected[parameter][1])
    constant, none = make_optimizer(model, small_settings('--sched', 'none'), updates=10, attention_lr=10.0)
    assert none is None and {rate for rate, _ in rates(constant).values()} == {0.1, 1.0}


@pytest.mark.parametrize('opt', ['sgd', 'adam', 'adamw'])
def test_fresh_units_step_as_with_a_larger_learning_rate(opt):
    """One step of an optimizer with that learning rate, taken from a copy, is the oracle."""
    source = load_source(SE)

    def stepped(lr: float, factor: float | None):
        torch.manual_seed(0)
        model = build(spec('cifar_senetv2_resnet20@lift'), 10, source)
        optimizer = timm.optim.create_optimizer_v2(model, opt, lr=lr, weight_decay=0.01)
        if factor:
            stretch = FreshUnits(model, fresh_units(model, source), factor)
            optimizer.register_step_pre_hook(stretch.before_step)
            optimizer.register_step_post_hook(stretch.after_step)
        model.train()
        torch.nn.functional.cross_entropy(model(torch.rand(8, 3, 32, 32)), torch.arange(8)).backward()
        optimizer.step()
        return model

    stretched, slow, fast = stepped(0.01, 10.0), stepped(0.01, None), stepped(0.1, None)
    differs = False
    for name, known in fresh_units(stretched, source).items():
        ours, slower, faster = (model.get_submodule(name) for model in (stretched, slow, fast))
        for a, b in (
            (ours.fc1.weight[known:], faster.fc1.weight[known:]),
            (ours.fc1.bias[known:], faster.fc1.bias[known:]),
            (ours.fc2.weight[:, known:], faster.fc2.weight[:, known:]),
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for a, b in (
            (ours.fc1.weight[:known], slower.fc1.weight[:known]),
            (ours.fc2.weight[:, :known], slower.fc2.weight[:, :known]),
            (ours.fc2.bias, slower.fc2.bias),
        ):
            assert torch.equal(a, b)
        differs |= not torch.equal(ours.fc2.weight[:, known:], slower.fc2.weight[:, known:])
    assert differs


def test_a_grid_of_starts_is_one_table_and_resumes(tmp_path, monkeypatch):
    arguments = [*DIGITS, '--per-class', '4', '--epochs', '2', '--init', SE, '--models', 'cifar_seresnet20@continue']
    arguments += ['cifar_senetv2_resnet20@lift:fresh_lr=10', 'cifar_senetv2_resnet20@scratch:epochs=3', '--out']
    reproduce.main([*arguments, str(tmp_path / 'whole')])
    with (tmp_path / 'whole' / 'results.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['model'] for row in rows] == arguments[arguments.index('--models') + 1 : -1]
    assert {row['init'] for row in rows} == {load_source(SE).sha256} and {row['per_class'] for row in rows} == {'4'}
    with (tmp_path / 'whole' / 'curves.csv').open(newline='') as file:
        epochs = [row['model'] for row in csv.DictReader(file)]
    assert [epochs.count(row['model']) for row in rows] == [2, 2, 3]
    assert rows[0]['init'] in (tmp_path / 'whole' / 'table.md').read_text()

    from timm.utils import CheckpointSaver

    save, calls = CheckpointSaver.save_checkpoint, []

    def interrupted(saver, epoch, metric):
        calls.append(epoch)
        save(saver, epoch, metric)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointSaver, 'save_checkpoint', interrupted)
        reproduce.main([*arguments, str(tmp_path / 'parts')])
    reproduce.main([*arguments, str(tmp_path / 'parts')])
    assert (tmp_path / 'parts' / 'curves.csv').read_bytes() == (tmp_path / 'whole' / 'curves.csv').read_bytes()


def test_per_class_takes_so_many_of_each_others_for_each_seed_and_fewer_among_more():
    data = load_dataset('digits')
    few = data.few(7, seed=3)
    assert torch.tensor(few.train.targets).bincount().tolist() == [7] * 10
    assert len(few.test) == len(data.test)

    def pixels(images):
        return {image.tobytes() for image in images.images}

    assert pixels(few.train) <= pixels(data.few(9, seed=3).train) <= pixels(data.train)
    assert pixels(few.train) != pixels(data.few(7, seed=4).train)
    with pytest.raises(UserError, match=r'--per-class 1000: class .* training images'):
        data.few(1000, seed=0)


def test_batches_of_few_images_are_those_of_the_seed():
    data = load_dataset('digits')
    batches = Batches(data, small_settings('--per-class', '3', '--batch-size', '30'), 0)
    model = timm.create_model('small_cnn')
    for seed in (0, 1, 0):
        training, test = batches.of(model, seed)
        ((images, targets),) = training.batches(0)
        assert len(images) == 30 and targets.bincount().tolist() == [3] * 10
        kept = torch.from_numpy(data.few(3, seed).train.images).float().mean()
        assert training.images[:, 1:-1, 1:-1].float().mean() == pytest.approx(kept.item(), abs=0.5)


def test_what_happens_after_each_epoch_can_be_watched():
    data = load_dataset('digits', limit=40)
    batches = Batches(data, small_settings('--epochs', '2'), 0)
    seen = []
    train(
        spec('small_saecnn'),
        0,
        batches.settings,
        batches,
        after_epoch=lambda epoch, model: seen.append((epoch, model.training, type(model).__name__)),
    )
    assert seen == [(1, False, 'SmallCNN'), (2, False, 'SmallCNN')]


def test_this_file_is_about_the_package_of_the_clone():
    where = importlib.util.find_spec('experiments').origin
    assert Path(where).parents[1] == Path(__file__).parents[1]
