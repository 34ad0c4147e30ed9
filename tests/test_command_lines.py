"""Whatever stands on the command line, in a weight file or in a card: a right result, or exit code 2 and one line."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreters import command

from timm_senetv2 import catalog
from timm_senetv2.checkpoints import convert_state_dict, load_weights, read_checkpoint
from timm_senetv2.commands import COMMANDS, main
from timm_senetv2.commands.options import model_kwargs
from timm_senetv2.create import check_options
from timm_senetv2.errors import UserError
from timm_senetv2.hub import Facts, load_facts
from timm_senetv2.timm_scripts import with_resume

some = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def exit_of(argv, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in argv])
    return done.value.code or 0, *capsys.readouterr()


def assert_one_line(error: UserError) -> None:
    assert str(error) and str(error).isprintable()


# The command itself


def test_help_lists_every_command_and_each_has_its_own(capsys):
    code, out, _ = exit_of(['--help'], capsys)
    assert code == 0 and all(f'  {name} ' in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, _ = exit_of([name, '--help'], capsys)
        assert code == 0 and out.startswith(f'usage: timm-senetv2 {name}')


def test_help_imports_neither_torch_nor_timm():
    code = """
import sys
from timm_senetv2.commands import main
for argv in (['--help'], ['push', '--help'], ['convert', '--help'], ['train', '--help']):
    try:
        main(argv)
    except SystemExit as e:
        assert not e.code
print({'torch', 'timm'} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith('set()\n')


@pytest.mark.parametrize(
    'argv, says',
    [
        (['modles'], 'did you mean models?'),
        (['\x1b[2J'], r'\x1b[2J'),
        (['models', 'nope'], "no model matches 'nope'"),
        (['convert', 'x.pth'], 'required: --model, --out'),
        (['push', '--model', 'x'], 'required'),
        (['convert', 'x', '--model', 'seanet2', '--out', 'o'], 'did you mean seanet'),
        (['convert', 'x', '--model', 'seanet20', '--out', '/'], 'root of a file system'),
        (['cards', 'o', '--owner', 'a/b'], 'is not a repository'),
        (['train', '--script', 'nope'], 'invalid choice'),
        (['train', '--resume', 'auto'], '--resume auto needs --experiment'),
        (['push', '--model', 'm', '--pretrained', 't', '--repo-id', 'me/x', '--timeout', 'nan'], 'must be above 0'),
    ],
)
def test_mistake_is_one_line_and_code_2(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'repo').mkdir()
    monkeypatch.setenv('TIMM_REPO', str(tmp_path / 'repo'))
    code, out, err = exit_of(argv, capsys)
    assert (code, out) == (2, '') and says in err
    assert err.startswith('error: ') and err.count('\n') == 1


@pytest.mark.parametrize(
    'pairs, says',
    [
        (['sae_reduction'], 'takes KEY=VALUE'),
        (['=3'], 'takes KEY=VALUE'),
        (['a b=3'], 'takes KEY=VALUE'),
        (['nope=1'], 'built with nope=1: it has no option nope$'),
        (['sae_reduktion=3'], r'it has no option sae_reduktion; did you mean sae_reduction\?'),
        (['drop_rate=abc'], 'drop_rate must be a number'),
        (['drop_rate=1.5'], 'drop_rate must be from 0 to below 1'),
        (['pretrained=True'], 'pretrained is not an option of a model'),
        (['checkpoint_path=x'], 'checkpoint_path is not an option'),
        (['sae_reduction=0'], 'at least 1'),
        (['num_classes=1000000000000'], 'more than the memory'),
        (['sae_cardinality=1000000000'], 'more than the memory'),
        (['depth=1000000002'], 'more than 1000 blocks'),
        (['in_chans=0'], 'no elements'),
        (['sae_reduction=' + '[' * 10000], 'nested too deeply|whole number'),
    ],
)
def test_wrong_option_of_a_model_is_one_line(pairs, says):
    with pytest.raises(UserError, match=says) as caught:
        check_options('cifar_senetv2_resnet20', model_kwargs(pairs))
    assert_one_line(caught.value)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 300), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
OPTIONS = [
    'sae_reduction',
    'sae_cardinality',
    'sae_add_identity',
    'drop_rate',
    'num_classes',
    'in_chans',
    'global_pool',
]


@some
@given(st.sampled_from(['cifar_senetv2_resnet20', 'small_saecnn']), st.dictionaries(st.sampled_from(OPTIONS), values))
def test_any_options_build_a_model_or_are_refused_in_one_line(name, options):
    try:
        check_options(name, options)
    except UserError as e:
        assert_one_line(e)
    else:
        timm.create_model(name, device='meta', **options)


@some
@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_text_for_model_kwargs_is_read_or_refused_in_one_line(pairs):
    try:
        read = model_kwargs(pairs)
    except UserError as e:
        assert_one_line(e)
    else:
        assert set(read) == {pair.partition('=')[0] for pair in pairs}


# The list of models


def test_models_lists_names_sizes_and_tags(capsys):
    code, out, _ = exit_of(['models', 'senetv2_resnet5*', 'small_cnn', '--json'], capsys)
    rows = {row['name']: row for row in json.loads(out)}
    assert code == 0 and set(rows) == {'senetv2_resnet50', 'small_cnn'}
    assert rows['senetv2_resnet50']['params'] == 30_603_912
    model = timm.create_model('small_cnn')
    assert rows['small_cnn']['params'] == sum(p.numel() for p in model.parameters()) and not rows['small_cnn']['tags']
    code, out, _ = exit_of(['models', 'senetv2_resnet50'], capsys)
    assert 'se_ra2_in1k* 81.29 (288)' in out and '30.60' in out and '4.094' in out


def test_catalog_has_every_model_and_every_tag_of_the_registry():
    ours = set(catalog.names())
    released = {name for name in timm.list_pretrained() if name.partition('.')[0] in ours}
    assert {f'{name}.{tag}' for name in catalog.names() for tag in catalog.tags(name)} == released
    for name in catalog.names():
        default = timm.models.get_pretrained_cfg(name)
        assert catalog.tags(name)[:1] == ([default.tag] if default.has_weights else [])


# Weight files

DAMAGES = ['drop', 'extra', 'shape', 'nan', 'inf', 'int', 'half', 'double', 'rename', 'none', 'complex']


@some
@given(st.lists(st.sampled_from(DAMAGES), max_size=3), st.integers(0, 10**6), st.sampled_from(['pth', 'safetensors']))
def test_any_state_dict_loads_rightly_or_is_refused_in_one_line(tmp_path, damages, position, suffix):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source = timm.create_model('small_saecnn')
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    for damage in damages:
        key = sorted(state)[position % len(state)]
        tensor = state[key]
        if damage == 'drop':
            del state[key]
        elif damage in ('extra', 'rename'):
            state['zz\n' + key] = tensor.clone() if damage == 'extra' else state.pop(key)
        elif damage == 'shape':
            state[key] = tensor.new_zeros((*tensor.shape, 2))
        elif damage in ('nan', 'inf') and tensor.is_floating_point():
            state[key] = torch.full_like(tensor, float(damage))
        elif damage in ('int', 'half', 'double', 'complex'):
            kinds = dict(int=torch.int32, half=torch.float16, double=torch.float64, complex=torch.complex64)
            state[key] = tensor.to(kinds[damage])
    path = tmp_path / f'w.{suffix}'
    save_file(state, path) if suffix == 'safetensors' else torch.save(state, path)
    model = timm.create_model('small_saecnn')
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        load_weights(model, read_checkpoint(path), str(path))
    except UserError as e:
        assert_one_line(e)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    else:
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[key].to(tensor.dtype)) and tensor.isfinite().all()


@some
@given(st.binary(max_size=200), st.sampled_from(['pth', 'safetensors', 'bin']))
def test_any_bytes_are_refused_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f'x.{suffix}'
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert_one_line(caught.value)


@pytest.mark.parametrize('epoch', ['seven', [1], 1e300, math.nan, True, torch.ones(3), None, -(10**30), {}])
def test_odd_epochs_in_a_file_are_passed_over(tmp_path, epoch):
    state = timm.create_model('small_cnn').state_dict()
    torch.save(dict(state_dict=state, epoch=epoch, best_acc1=epoch), tmp_path / 'x.pth')
    read = read_checkpoint(tmp_path / 'x.pth')
    assert read.epoch is None and read.best_acc1 is None and read.state_dict.keys() == state.keys()


def test_compressed_file_is_refused_before_it_grows(tmp_path):
    import zipfile

    torch.save(dict(a=torch.zeros(1 << 20)), tmp_path / 'x.pth')
    with zipfile.ZipFile(tmp_path / 'x.pth') as plain, zipfile.ZipFile(tmp_path / 'b.pth', 'w', 8) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert read_checkpoint(tmp_path / 'x.pth').state_dict['a'].shape == (1 << 20,)
    with pytest.raises(UserError, match='not a checkpoint, or it is damaged'):
        read_checkpoint(tmp_path / 'b.pth')


def test_checkpoint_of_timms_training_with_averaged_weights_is_converted(tmp_path, capsys):
    import argparse

    from safetensors.torch import load_file

    plain, averaged = (timm.create_model('small_saecnn', num_classes=3).state_dict() for _ in range(2))
    content = dict(epoch=4, args=argparse.Namespace(lr=0.1), state_dict=plain, state_dict_ema=averaged)
    torch.save(content, tmp_path / 'last.pth.tar')
    for options, expected in (((), plain), (('--ema',), averaged)):
        command = ['convert', tmp_path / 'last.pth.tar', '--model', 'small_saecnn', '--out', tmp_path / 'out', *options]
        code, out, err = exit_of(command, capsys)
        assert code == 0 and 'epoch: 4' in out and 'classes: 3' in out, err
        written = load_file(tmp_path / 'out' / 'model.safetensors')
        assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())


def test_native_weights_of_any_shape_of_attention_pass_through():
    model = timm.create_model('cifar_senetv2_resnet20', sae_reduction=1, sae_cardinality=1)
    state = model.state_dict()
    converted = convert_state_dict(state, model)
    assert all(torch.equal(converted[key], tensor) for key, tensor in state.items())


# Cards

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates())
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3))


@some
@given(st.dictionaries(st.sampled_from([*Facts.model_fields, 'x']), trees, max_size=3))
def test_any_card_is_read_or_refused_in_one_line(tmp_path, facts):
    path = tmp_path / 'facts.yaml'
    path.write_text(yaml.safe_dump(facts, allow_unicode=True), encoding='utf-8', errors='surrogatepass')
    try:
        read = load_facts(path)
    except UserError as e:
        assert_one_line(e)
    else:
        assert set(facts) <= set(Facts.model_fields)
        assert read.summary == facts.get('summary', '') and read.labels == facts.get('labels')


@some
@given(st.text(max_size=200))
def test_any_text_as_a_card_is_read_or_refused_in_one_line(tmp_path, text):
    path = tmp_path / 'facts.yaml'
    path.write_text(text, encoding='utf-8', errors='surrogatepass', newline='')
    try:
        load_facts(path)
    except UserError as e:
        assert_one_line(e)


@pytest.mark.parametrize(
    'text',
    [
        'limits: ' + '[' * 100_000,
        '- ' * 5000 + 'x',
        'a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]',
        '? [a]\n: b',
        '<<: {summary: x}',
        'x' * (2 << 20),
        'limits: ' + '1' * 5000,
        'summary: !!python/object/apply:os.system [id]',
    ],
)
def test_hostile_yaml_is_refused_at_once(tmp_path, text):
    (tmp_path / 'facts.yaml').write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_facts(tmp_path / 'facts.yaml')
    assert_one_line(caught.value)
    assert len(str(caught.value)) < 1500 and time.monotonic() - began < 5


# train --resume auto


def checkpoint(folder: Path, name: str, epoch: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(epoch=epoch, state_dict={}), folder / f'{name}.pth.tar')


def test_resume_auto_takes_the_latest_epoch_and_passes_damaged_files_over(tmp_path, monkeypatch):
    run = tmp_path / 'out' / 'run'
    given = ['--output', str(tmp_path / 'out'), '--experiment', 'run', '--resume', 'auto', '--', '--resume', 'auto']
    rest = [*given[:4], '--', '--resume', 'auto']
    assert with_resume(given) == rest  # nothing there yet: a fresh start

    checkpoint(run, 'recovery-9-3', 9)
    assert with_resume(given) == [*given[:4], '--resume', str(run / 'recovery-9-3.pth.tar'), *rest[4:]]
    checkpoint(run, 'checkpoint-4', 4)
    checkpoint(run, 'last', 5)
    checkpoint(run, 'model_best', 5)
    assert with_resume(given)[5] == str(run / 'last.pth.tar')
    (run / 'last.pth.tar').write_bytes((run / 'last.pth.tar').read_bytes()[:100])
    (run / 'model_best.pth.tar').unlink()
    assert with_resume(['--resume=auto', *given[:4]]) == [
        *('--resume', str(run / 'checkpoint-4.pth.tar')),
        *given[:4],
    ]

    (tmp_path / 'recipe.yaml').write_text(f'experiment: run\noutput: {tmp_path}/out\n')
    assert with_resume(['-c', f'{tmp_path}/recipe.yaml', '--resume', 'auto'])[-1] == str(run / 'checkpoint-4.pth.tar')


def test_resume_from_a_path_is_left_to_timm():
    assert with_resume(['--resume', 'x.pth.tar', '--lr', '0.1']) == ['--resume', 'x.pth.tar', '--lr', '0.1']


# A Hub that takes its time


def test_push_to_a_trickling_hub_ends_in_time_and_the_next_finishes(hub_server, tmp_path, interpreters):
    hub_server.tokens['hf_sentinel'] = 'write'
    hub_server.fault('GET', '/whoami-v2', trickle=1.0)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
    environment.update(HF_ENDPOINT=hub_server.url, HF_HOME=str(tmp_path / 'hf'), HF_HUB_DISABLE_XET='1')
    environment.update(HF_TOKEN='hf_sentinel', TMPDIR=str(tmp_path / 'tmp'))
    (tmp_path / 'tmp').mkdir()
    arguments = ['-m', 'timm_senetv2', 'push', '--model', 'cifar_resnet20', '--pretrained', 'fmnist']
    arguments += ['--repo-id', 'me/x']
    often = 'import timm_senetv2.commands.push as push; push._REPORT_EVERY = 2.0\n'
    slow = interpreters.run(often + command([*arguments, '--timeout', '0.05']), env=environment)
    assert slow.returncode == 2, slow.stderr
    progress, error = slow.stderr.splitlines()
    assert progress.startswith('check the token: 2 s of at most 3 s')
    assert error.startswith('error: the push was not over after 0.05 minutes; its last step: check the token. ')
    assert not list((tmp_path / 'tmp').iterdir())
    done = interpreters.run(command(arguments), env=environment)
    assert done.returncode == 0, done.stderr
    assert 'model.safetensors' in hub_server.model('me/x').files()
