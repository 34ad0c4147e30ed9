import json
import os
import sys
import textwrap
import urllib.error
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from interpreters import command

from timm_senetv2 import timm_scripts
from timm_senetv2.commands import main
from timm_senetv2.commands.train import SCRIPTS
from timm_senetv2.commands.train import main as train
from timm_senetv2.errors import UserError

REPORT = """
import json, os, sys
import timm
with open(os.environ['REPORT'], 'w') as f:
    json.dump(dict(
        main=__name__, script=__file__, argv=sys.argv, timm=timm.__file__, path=sys.path,
        registered=timm.is_model('senetv2_resnet50'),
    ), f)
"""


def make_checkout(folder: Path, version: str = timm.__version__) -> Path:
    """What a checkout of timm's repository has, with scripts that report how they were run."""
    (folder / 'timm').mkdir(parents=True)
    (folder / 'timm' / '__init__.py').write_text('raise ImportError("the checkout\'s timm was imported")')
    (folder / 'timm' / 'version.py').write_text(f"__version__ = '{version}'\n")
    for name in SCRIPTS:
        (folder / f'{name}.py').write_text(REPORT)
    (folder / 'hubconf.py').write_text('dependencies = ["torch"]\nimport timm\n')
    return folder


@pytest.fixture
def checkout(tmp_path) -> Path:
    return make_checkout(tmp_path / 'checkout')


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub cache and no network."""
    folder = tmp_path / 'hub'
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(folder))
    monkeypatch.delenv('TIMM_REPO', raising=False)

    def offline(*args, **kwargs):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    return folder


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Call the script's main function with arguments; returns what timm's script, if it ran, reported."""
    report = tmp_path / 'report.json'
    monkeypatch.setenv('REPORT', str(report))
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', torch.nn.parallel.DistributedDataParallel)
    for name in ('WORLD_SIZE', 'RANK'):
        monkeypatch.delenv(name, raising=False)

    def run_main(*argv: str) -> dict:
        report.unlink(missing_ok=True)
        with monkeypatch.context() as m:
            m.setattr(sys, 'argv', ['timm-senetv2'])
            own = ('', os.getcwd())
            m.setattr(sys, 'path', [os.getcwd(), *(p for p in sys.path if p not in own)])  # as `python -m` has it
            train(argv)
        return json.loads(report.read_text())

    return run_main


def test_arguments_reach_timms_script_untouched(checkout, run_main):
    argv = [
        '/data',
        '--model',
        'x',
        '--mean',
        '0.5',
        '-0.5',
        '-vb',
        '3',
        '--script-like',
        '--model-kwargs',
        'a=1',
        '--help-me',
        '--',
        '/positional',
        '--script',
        'validate',
    ]
    report = run_main('--timm-repo', str(checkout), *argv)
    assert report['main'] == '__main__'
    assert report['script'] == str(checkout / 'train.py')
    assert report['argv'] == [str(checkout / 'train.py'), *argv]


def test_own_options_may_stand_anywhere(checkout, run_main):
    report = run_main('--amp', '--script=validate', '--data-dir', 'd', '--timm-repo', str(checkout), '-j', '0')
    assert report['argv'] == [str(checkout / 'validate.py'), '--amp', '--data-dir', 'd', '-j', '0']


def test_timm_is_the_installed_one_with_our_models(checkout, run_main):
    report = run_main('--timm-repo', str(checkout))
    assert report['timm'] == timm.__file__
    assert report['registered']
    assert report['path'][-1] == str(checkout)
    assert os.getcwd() not in report['path']


def test_help_is_ours_and_timm_help_is_timms(checkout, run_main, capsys):
    with pytest.raises(SystemExit) as e:
        run_main('--help')
    assert e.value.code == 0
    assert '--timm-help' in capsys.readouterr().out
    assert run_main('--timm-repo', str(checkout), '--timm-help')['argv'][1:] == ['--help']


def test_environment_names_the_checkout_and_the_option_wins(tmp_path, monkeypatch, run_main):
    first, second = make_checkout(tmp_path / 'a'), make_checkout(tmp_path / 'b')
    monkeypatch.setenv('TIMM_REPO', str(first))
    assert run_main()['script'] == str(first / 'train.py')
    assert run_main('--timm-repo', str(second))['script'] == str(second / 'train.py')


def test_checkout_in_torch_hubs_cache_is_used_offline(hub, run_main):
    cached = make_checkout(hub / f'huggingface_pytorch-image-models_v{timm.__version__}')
    assert run_main('--script', 'benchmark')['script'] == str(cached / 'benchmark.py')


def test_another_releases_checkout_in_the_cache_is_not_used(hub, run_main):
    make_checkout(hub / 'huggingface_pytorch-image-models_v0.0.1', '0.0.1')
    with pytest.raises(UserError, match='could not be fetched'):
        run_main()


@pytest.mark.parametrize('rank, warned', [(None, True), ('0', True), ('1', False)])
def test_other_version_warns_once(tmp_path, monkeypatch, run_main, capsys, rank, warned):
    old = make_checkout(tmp_path / 'old', '0.9.1')
    if rank is not None:
        monkeypatch.setenv('RANK', rank)
    assert run_main('--timm-repo', str(old))['timm'] == timm.__file__
    err = capsys.readouterr().err
    assert ('0.9.1' in err and timm.__version__ in err) == warned


def test_same_version_does_not_warn(checkout, run_main, capsys):
    run_main('--timm-repo', str(checkout))
    assert 'warning' not in capsys.readouterr().err


def test_folder_that_is_no_checkout_is_refused(tmp_path, run_main):
    with pytest.raises(UserError, match='has no validate.py; --timm-repo and .TIMM_REPO name a checkout'):
        run_main('--timm-repo', str(tmp_path), '--script', 'validate')


def test_fetched_by_torch_hub_into_its_cache(hub, tmp_path, monkeypatch, run_main, capsys):
    source = make_checkout(tmp_path / 'huggingface-pytorch-image-models-0123abc')
    urls = []

    def download(url, dst, *args, **kwargs):
        urls.append(url)
        with zipfile.ZipFile(dst, 'w') as archive:
            for path in [source, *sorted(source.rglob('*'))]:
                archive.write(path, path.relative_to(tmp_path))

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    expected = hub / f'huggingface_pytorch-image-models_v{timm.__version__}' / 'train.py'
    assert run_main()['script'] == str(expected)
    assert run_main()['script'] == str(expected)
    assert len(urls) == 1 and urls[0].endswith(f'huggingface/pytorch-image-models/zipball/v{timm.__version__}')
    assert capsys.readouterr().out == ''


def test_ranks_that_start_together_fetch_once(tmp_path, interpreters):
    source = make_checkout(tmp_path / 'huggingface-pytorch-image-models-0123abc')
    launcher = textwrap.dedent(f"""
        import shutil, sys, time
        import torch

        def download(url, dst, *args, **kwargs):
            print('downloading', file=sys.stderr, flush=True)
            time.sleep(2)
            shutil.make_archive(dst.removesuffix('.zip'), 'zip', {str(tmp_path)!r}, {source.name!r})

        torch.hub.download_url_to_file = download
    """)
    environment = {k: v for k, v in os.environ.items() if k != 'TIMM_REPO'} | dict(TORCH_HOME=str(tmp_path / 'home'))
    ranks = [
        interpreters.start(
            launcher + command(['-m', 'timm_senetv2', 'train']),
            env=environment | dict(RANK=str(rank), REPORT=str(tmp_path / f'{rank}.json')),
        )
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    errors = [rank.stderr for rank in ranks]
    assert sum(error.splitlines().count('downloading') for error in errors) == 1
    scripts = {json.loads((tmp_path / f'{rank}.json').read_text())['script'] for rank in range(2)}
    assert len(scripts) == 1


def test_offline_and_nothing_cached_says_in_one_line_what_to_run(hub, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        main(['train', '--data-dir', 'x'])
    assert e.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error:')]
    assert f'git clone --depth 1 --branch v{timm.__version__} https://github.com/huggingface/' in line
    assert '--timm-repo' in line


def test_ddp_takes_the_cpu_that_train_py_names(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 2)
        x = torch.randn(5, 3)
        wrapped = timm_scripts.AnyDeviceDDP(model, device_ids=[torch.device('cpu')])
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
        wrapped(x).sum().backward()
        assert torch.allclose(model.weight.grad, x.sum(0).expand(2, 3))
    finally:
        torch.distributed.destroy_process_group()


def test_ddp_is_replaced_under_torchrun_only(checkout, run_main, monkeypatch):
    original = torch.nn.parallel.DistributedDataParallel
    run_main('--timm-repo', str(checkout))
    assert torch.nn.parallel.DistributedDataParallel is original
    monkeypatch.setenv('WORLD_SIZE', '2')
    run_main('--timm-repo', str(checkout))
    assert torch.nn.parallel.DistributedDataParallel is timm_scripts.AnyDeviceDDP
