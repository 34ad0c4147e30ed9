"""hubconf.py: torch.hub finds and builds every model, from a checkout that is not installed."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import timm

from timm_senetv2 import catalog

ROOT = Path(__file__).parents[1]
# As if no package were installed that torch calls
ALONE = """
import sys, warnings
sys.meta_path[:] = [finder for finder in sys.meta_path if 'Timm' not in repr(finder)]
del sys.modules['timm_senetv2_autoload']
warnings.simplefilter('error', RuntimeWarning)
"""
PROGRAM = """
import json, sys
import torch

github = dict(github='me/timm-senetv2:main', skip_validation=True, trust_repo=True)  # is in torch.hub's cache already
names = torch.hub.list(**github)
with torch.device('meta'):
    params = {
        name: sum(p.numel() for p in torch.hub.load('.', name, source='local', pretrained=False).parameters())
        for name in names
    }
small = torch.hub.load('.', 'cifar_senetv2_resnet20', source='local', pretrained=True, num_classes=3, in_chans=1)
with torch.inference_mode():
    shape = list(small(torch.randn(2, 1, 32, 32)).shape)
help = {name: torch.hub.help(model=name, **github) for name in names}
print(json.dumps(dict(params=params, help=help, shape=shape, package=sys.modules['timm_senetv2'].__file__)))
"""


@pytest.fixture(scope='module')
def answers(tmp_path_factory, interpreters) -> dict:
    """What torch.hub says of a checkout that nobody installed; an installed package keeps out of the way."""
    home = tmp_path_factory.mktemp('torch')
    clone = home / 'hub' / 'me_timm-senetv2_main'
    clone.mkdir(parents=True)
    for name in ('hubconf.py', 'timm_senetv2_autoload.py'):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(
        ROOT / 'timm_senetv2', clone / 'timm_senetv2', ignore=shutil.ignore_patterns('cards', '__pycache__')
    )
    done = interpreters.run(ALONE + PROGRAM, clone, env={**os.environ, 'TORCH_HOME': str(home)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found['package']).is_relative_to(clone)
    return found


def test_every_model_is_an_entry_point_and_nothing_else_is(answers):
    assert sorted(answers['params']) == sorted(catalog.names())


def test_every_model_is_built(answers):
    assert answers['params']['senetv2_resnet50'] == 25_557_032 + 5_046_880
    assert answers['params']['seanet20'] == 16_188_330
    for name, params in answers['params'].items():
        assert params == sum(p.numel() for p in timm.create_model(name, device='meta').parameters())


def test_arguments_reach_the_model(answers):
    assert answers['shape'] == [2, 3]


def test_help_is_the_models_docstring(answers):
    assert all(text and len(text) > 20 for text in answers['help'].values())
    assert 'SaE' in answers['help']['senextv2_50']


def test_dependencies_are_the_packages_own():
    """torch.hub looks whether they can be imported before it builds a model."""
    tree = ast.parse((ROOT / 'hubconf.py').read_text())
    (declared,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == 'dependencies'
    )
    text = (ROOT / 'pyproject.toml').read_text()
    required = text.partition('\ndependencies = [')[2].partition(']')[0].replace('huggingface-hub', 'huggingface_hub')
    assert {'timm', 'torch'} <= set(declared) and all(f'"{name}>=' in required for name in declared)
