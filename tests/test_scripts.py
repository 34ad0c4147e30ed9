"""What a user gets wrong with the scripts of a clone: one plain line on stderr, and exit code 2."""

from importlib import import_module
from pathlib import Path

import pytest

from timm_senetv2.errors import run

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / 'scripts' / 'recipes' / 'senetv2_resnet50_rsb_a2.yaml')
REPRODUCE = ('--dataset', 'digits', '--out', 'new', '--models')


@pytest.mark.parametrize(
    'script, argv, says',
    [
        ('docs', ['--chek'], 'unrecognized arguments: --chek; '),
        ('docs', ['nowhere.md'], 'nowhere.md cannot be used: No such file'),
        ('docs', ['.'], 'Is a directory'),
        ('docs', ['latin.md'], 'latin.md is not a text file in UTF-8'),
        ('make_imagenet_subset', [], 'required: SRC, DST'),
        ('make_imagenet_subset', ['nowhere', 'new'], 'nowhere is neither a folder nor a .tar file'),
        ('make_imagenet_subset', ['empty', 'new'], 'empty holds no images'),
        ('make_imagenet_subset', ['latin.tar', 'new'], 'latin.tar cannot be read: truncated header'),
        ('make_imagenet_subset', ['empty', 'new', '--per-class', 'x'], "invalid int value: 'x'"),
        ('make_imagenet_subset', ['a\nb', 'new'], r'a\nb is neither a folder'),
        ('plan_training', ['--gpus', '0', '--gpu', 'h100', '--recipe', RECIPE], 'is not a whole number from 1 to'),
        ('plan_training', ['--gpus', '1', '--gpu', 'h100', '--recipe', 'latin.md'], 'latin.md cannot be read'),
        ('plan_training', ['--gpus', '1', '--gpu', 'h100', '--recipe', 'deep.yaml'], 'nested too deeply'),
        (
            'plan_training',
            ['--gpus', '1', '--gpu', 'h100', '--recipe', 'odd.yaml'],
            'names no model that timm knows: [1, 2]',
        ),
        ('plan_training', ['--gpus', '1', '--gpu', 'h100', '--recipe', 'ten.yaml'], 'epochs of the recipe must be a w'),
        ('benchmark', ['--models', 'senetv2_resnet05'], "'senetv2_resnet05'; did you mean senetv2_resnet50"),
        ('benchmark', ['--compile-mode', 'max-autotune'], 'has a meaning with --compile only; '),
        ('benchmark', ['--size', '0'], 'is not a whole number above zero'),
        ('benchmark', ['--models', 'small_cnn', '--out', 'results'], 'benchmark_custom.csv'),
        ('families', ['lfit'], "invalid choice: 'lfit'"),
        ('on_gpu', ['--devise', 'cpu'], 'unrecognized arguments: --devise'),
        ('compare_architectures', ['--image-size', 'x'], "invalid int value: 'x'"),
        ('lift_worth', ['--results', 'empty'], 'empty has no runs'),
        ('sweep_cost', ['--runs', '1', '--out', 'new'], '--runs must be at least 2'),
        ('quickstart', ['--epochs', 'ten'], "invalid int value: 'ten'"),
        ('quickstart', ['--models'], 'expected at least one argument'),
        ('reproduce', [*REPRODUCE], 'expected at least one argument'),
        ('reproduce', [*REPRODUCE, 'small_cn'], 'did you mean small_cnn'),
        ('reproduce', [*REPRODUCE, 'seanet20:sae_reduktion=3'], 'it has no option sae_reduktion; did you mean sae_red'),
        ('reproduce', [*REPRODUCE, 'small_cnn:widths=[0,1,2]'], 'conv1.weight of small_cnn has no elements'),
        ('reproduce', [*REPRODUCE, 'small_cnn:num_classes=3'], 'num_classes is that of the data'),
        ('reproduce', [*REPRODUCE, 'cifar_resnet20:depth=6000000002'], 'is more than 1000 blocks'),
        ('reproduce', [*REPRODUCE, 'cifar_resnet20:sae_reduction=3'], 'has no meaning in a model without attention'),
        ('reproduce', [*REPRODUCE, 'small_cnn', '--sched', 'x'], "invalid choice: 'x'"),
    ],
)
def test_mistake_is_one_line_and_code_2(script, argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    for name in ('latin.md', 'latin.tar'):
        (tmp_path / name).write_bytes(b'caf\xe9')
    (tmp_path / 'deep.yaml').write_text('- ' * 5000)
    (tmp_path / 'odd.yaml').write_text('model: [1, 2]\n')
    (tmp_path / 'ten.yaml').write_text('model: resnet18\nepochs: ten\n')
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'benchmark_custom.csv').write_bytes(b'caf\xe9,\n')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as done:
        run(lambda: import_module(script).main(argv))
    out, err = capsys.readouterr()
    assert (done.value.code, out) == (2, '')
    assert err.startswith('error: ') and says in err and err.count('\n') == 1
    assert sorted(tmp_path.rglob('*')) == before
