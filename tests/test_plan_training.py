"""experiments/cost.py and scripts/plan_training.py: the model of cost against published speeds, and its arithmetic."""

import csv
from dataclasses import replace
from pathlib import Path

import plan_training
import pytest

from experiments import cost
from experiments.benchmark.report import COLUMNS
from timm_senetv2.errors import UserError, run

RECIPES = Path(__file__).parents[1] / 'scripts' / 'recipes'
RECIPE = dict(model='senetv2_resnet50', num_classes=1000, epochs=100, batch_size=256)


@pytest.mark.parametrize('name', cost.PUBLISHED)
def test_estimate_is_within_a_quarter_of_the_published_speed(name):
    assert cost.images_per_second(name, cost.GPUS['rtx3090']) == pytest.approx(cost.PUBLISHED[name], rel=0.25)


def test_bandwidth_limits_until_the_matrix_units_do():
    gpu = cost.GPUS['rtx3090']
    speed = cost.images_per_second('senetv2_resnet50', gpu)
    twice = cost.images_per_second('senetv2_resnet50', replace(gpu, bandwidth=2 * gpu.bandwidth, rate=2 * gpu.rate))
    assert twice == pytest.approx(2 * speed)
    endless = cost.images_per_second('senetv2_resnet50', replace(gpu, bandwidth=1e18))
    assert endless == pytest.approx(gpu.rate * cost.EFFICIENCY / (6 * 4.1e9), rel=0.01)
    assert cost.images_per_second('senetv2_resnet50', gpu, compiled=True) > speed


def test_hours_network_loader_and_price_follow_from_the_speed():
    found = cost.plan(RECIPE, 8, 'a100', price=2.0)
    assert found.images == pytest.approx(8 * found.images_per_gpu)  # NVLink hides the exchange
    assert found.hours == pytest.approx(100 * 1_281_167 * cost.VALIDATION / found.images / 3600)
    assert found.price == pytest.approx(16 * found.hours)
    assert found.gradient_bytes == 4 * 30_603_912
    assert found.loader_bytes == pytest.approx(found.images * 107_714, rel=1e-3)

    slow = cost.plan(RECIPE, 8, 'a100', network=1e9)
    exchange = 2 * 7 / 8 * found.gradient_bytes / 1e9
    compute = 256 / slow.images_per_gpu
    assert slow.exchange_seconds == pytest.approx(exchange)
    assert slow.step_seconds == pytest.approx(compute + max(0, exchange - 2 / 3 * compute))
    assert slow.hours > found.hours
    assert cost.plan(RECIPE, 1, 'a100').exchange_seconds == 0


def test_measured_speed_takes_precedence(tmp_path):
    row = dict.fromkeys(COLUMNS, '') | dict(
        contestant='senetv2_resnet50', machine='NVIDIA H200', training='True', runtime='eager', images_per_s='2345'
    )
    path = tmp_path / 'benchmark_cuda.csv'
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerow(row)
    found = cost.plan(RECIPE, 1, 'h200', results=path)
    assert found.images_per_gpu == 2345 and found.source.startswith('measured')
    assert cost.plan(RECIPE, 1, 'h100', results=path).source.startswith('estimated')


@pytest.mark.parametrize('recipe', sorted(RECIPES.glob('*.yaml')), ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(recipe, capsys):
    plan_training.main(['--gpus', '16', '--gpu', 'h100', '--recipe', str(recipe), '--images', '320000', '--price', '3'])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names[:6] == ['one', 'all', 'hours', 'gradients', 'loader', 'price']
    text = recipe.read_text()
    assert ('assumed' in names) == ('amp: true' not in text)
    assert ('too' in names) == ('imagenet' not in text.lower() and 'own classes' not in text)
    assert '320,000 images' in lines[0]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--gpu', 'h1000'], "no figures for the GPU 'h1000'; did you mean h100"),
        (['--gpu', 'h100', '--recipe', 'missing.yaml'], 'missing.yaml cannot be read'),
        (['--gpu', 'h100', '--gpus', '0'], 'not a whole number from 1 to 1,000,000'),
        (['--gpu', 'h100', '--gpus', '1' + 400 * '0'], 'not a whole number from 1 to 1,000,000'),
        (['--gpu', 'h100', '--images', '1.5'], 'not a whole number'),
        (['--gpu', 'h100', '--price', '-1'], 'not a number above zero'),
        (['--gpu', 'h100', '--price', 'much'], 'not a number above zero'),
        (['--gpu', 'h100', '--network', '1e-300'], 'not a number above zero'),
    ],
)
def test_bad_input_costs_one_line(arguments, message, capsys):
    defaults = ['--gpus', '8', '--recipe', str(RECIPES / 'senetv2_resnet50_rsb_a2.yaml')]
    with pytest.raises(SystemExit) as stop:
        run(lambda: plan_training.main([*defaults, *arguments]))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_images_and_options_of_the_recipe_count():
    whole = cost.plan(RECIPE, 1, 'a100')
    small = cost.plan(RECIPE | dict(img_size=112), 1, 'a100')
    assert whole.input_size == (3, 224, 224) and small.input_size == (3, 112, 112)
    assert small.images_per_gpu == pytest.approx(4 * whole.images_per_gpu, rel=0.03)  # SE and fc stay
    grey = cost.plan(RECIPE | dict(input_size=[1, 32, 64]), 1, 'a100')
    assert grey.input_size == (1, 32, 64) and grey.loader_cores is None
    assert whole.gradient_bytes - grey.gradient_bytes == 4 * 2 * 64 * 7 * 7
    wider = cost.plan(RECIPE | dict(model_kwargs=dict(sae_cardinality=8)), 1, 'a100')
    assert wider.gradient_bytes > whole.gradient_bytes
    assert cost.plan(RECIPE | dict(dataset=None, num_classes=None), 1, 'a100').training_images == 1_281_167


@pytest.mark.parametrize(
    'option, message',
    [
        (dict(input_size=[3, 0, 'x']), 'channels, height and width'),
        (dict(input_size=[224, 224]), 'channels, height and width'),
        (dict(img_size='large'), 'img_size one side'),
        (dict(model='vit_tiny_patch16_224', img_size=100), 'cannot be built, or take its images'),
        (dict(model_kwargs=['a']), 'model_kwargs of the recipe must be options'),
        (dict(model_kwargs=dict(nothing=1)), 'cannot be built'),
        (dict(model='resnet500'), 'did you mean'),
        (dict(batch_size=None), 'batch_size of the recipe must be a whole number'),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_line(option, message):
    with pytest.raises(UserError, match=message) as error:
        cost.plan(RECIPE | option, 8, 'a100')
    assert '\n' not in str(error.value)


def test_the_page_shows_what_the_command_prints(capsys):
    page = (RECIPES.parents[1] / 'docs' / 'many-machines.md').read_text()
    command, _, rest = page.partition('python scripts/plan_training.py ')[2].partition('\n```\n\n```text\n')
    words = [str(RECIPES.parents[1] / word) if word.endswith('.yaml') else word for word in command.split()]
    plan_training.main(words)
    assert capsys.readouterr().out.strip() == rest.partition('\n```')[0]


def test_unknown_data_set_needs_its_size():
    with pytest.raises(UserError, match='give --images'):
        cost.plan(RECIPE | dict(dataset='tfds/mine'), 8, 'a100')
    assert cost.plan(RECIPE | dict(dataset='tfds/mine'), 8, 'a100', images=1000).hours > 0
