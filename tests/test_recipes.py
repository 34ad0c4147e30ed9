import os
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data import create_transform
from timm.models import get_pretrained_cfg, is_model_pretrained
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

RECIPES = sorted((Path(__file__).parents[1] / 'scripts' / 'recipes').glob('*.yaml'))
needs_timm_repo = pytest.mark.skipif(
    not os.environ.get('TIMM_REPO'),
    reason=f"timm's train.py is not in its wheel: set TIMM_REPO to a checkout of timm v{timm.__version__}",
)
each_recipe = pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: p.stem)


def load(recipe: Path) -> dict:
    return yaml.safe_load(recipe.read_text())


@pytest.fixture
def parse(monkeypatch):
    """train.py's own parsing of its command line."""

    def parse(*argv: str):
        with monkeypatch.context() as m:
            m.setattr(sys, 'argv', ['train.py', *argv])
            script = runpy.run_path(str(Path(os.environ['TIMM_REPO']) / 'train.py'))
            return script['parser'], script['_parse_args']()[0]

    return parse


def test_there_is_a_recipe_for_every_case():
    assert {recipe.stem for recipe in RECIPES} == {
        'senetv2_resnet50_rsb_a2',
        'senextv2_50_rsb_a2',
        'senetv2_resnet50_adam',
        'senextv2_50_adam',
        'senetv2_resnet50_finetune',
        'seanet20_cifar10',
        'seanet20_cifar100',
        'cifar_senetv2_resnet20_fashion_mnist',
    }


@each_recipe
def test_header_says_how_to_run_it_what_it_costs_and_what_to_expect(recipe):
    header = recipe.read_text().split('\n\n')[0].splitlines()
    assert all(line.startswith('#') for line in header)
    text = '\n'.join(header)
    assert f'train --config scripts/recipes/{recipe.name} --data-dir ' in text
    assert '\n# Costs (' in text
    assert '\n# Expect: ' in text


@each_recipe
def test_model_is_in_timm(recipe):
    settings = load(recipe)
    assert timm.is_model(settings['model'])
    if settings.get('pretrained'):
        assert is_model_pretrained(settings['model'])
        assert get_pretrained_cfg(settings['model']).has_weights


@needs_timm_repo
@each_recipe
def test_every_setting_is_one_that_train_py_would_take_on_its_command_line(recipe, parse):
    parser, from_config = parse('--config', str(recipe))
    argv = []
    for name, value in load(recipe).items():
        (option,) = [a.option_strings[-1] for a in parser._actions if a.dest == name]  # argparse has no public list
        if isinstance(value, dict):
            argv += [option, *(f'{k}={v}' for k, v in value.items())]
        elif value is True:
            argv += [option]
        elif value is not None:
            argv += [option, *map(str, value if isinstance(value, list) else [value])]
    _, from_command_line = parse(*argv)
    off = {name: None for name, value in load(recipe).items() if value is None}  # not to be had on a command line
    assert vars(from_config) == vars(from_command_line) | off


@needs_timm_repo
@each_recipe
def test_timm_builds_optimizer_schedule_and_transforms_from_it(recipe, parse):
    args = parse('--config', str(recipe))[1]
    args.lr = args.lr or args.lr_base
    model = timm.create_model(args.model, device='meta', num_classes=args.num_classes)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    assert epochs == args.epochs
    schedule.step(args.warmup_epochs)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(args.lr, rel=0.05)
    transform = create_transform(
        tuple(args.input_size or model.pretrained_cfg['input_size']),
        is_training=True,
        scale=args.scale,
        ratio=args.ratio,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
    )
    assert ('ColorJitter' in str(transform)) == (args.color_jitter is not None and args.aa is None)


@needs_timm_repo
@pytest.mark.parametrize('classes', [10, 100])
def test_cifar_recipes_follow_the_papers_protocol(classes, parse):
    (recipe,) = [r for r in RECIPES if r.stem == f'seanet20_cifar{classes}']
    args = parse('--config', str(recipe))[1]
    model = timm.create_model(args.model, num_classes=args.num_classes)
    assert sum(p.numel() for p in model.parameters()) == {10: 16_188_330, 100: 16_199_940}[classes]
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups  # one: norms and biases decay too
    assert (group['momentum'], group['weight_decay'], group['nesterov']) == (0.9, 1e-4, False)
    schedule, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=782)
    rates = []
    for epoch in range(args.epochs):
        schedule.step(epoch)
        rates.append(group['lr'])
    assert rates == pytest.approx([0.1] * 80 + [0.01] * 80 + [0.001] * 40)
    assert (args.batch_size, args.smoothing, args.mixup, args.aa, args.reprob) == (64, 0, 0, None, 0)
    assert model.pretrained_cfg['mean'] == (0.4914, 0.4822, 0.4465)
    assert model.pretrained_cfg['std'] == (0.2023, 0.1994, 0.2010)
