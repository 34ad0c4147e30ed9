"""When and how the models reach timm's registry: every case in a fresh interpreter, as a user's program would."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from timm_senetv2.registration import MODEL_MODULES

COUNT = 38  # models of this package
PRELUDE = """
import json, sys, warnings
def ours():
    import timm
    return timm.list_models(module=['senetv2', 'cifar', 'small_cnn'])
"""


def fresh(code: str, *options: str, cwd: Path, files: dict[str, str] | None = None, **env: str):
    """Run code in a fresh interpreter that has `files` on its path; returns what it passes to print, and stderr."""
    for name, content in (files or {}).items():
        (cwd / name).write_text(textwrap.dedent(content))
    path = os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), str(cwd)]))
    clean = {k: v for k, v in os.environ.items() if not k.endswith('_AUTOLOAD')}
    result = subprocess.run(
        [sys.executable, *options, '-c', PRELUDE + textwrap.dedent(code)],
        cwd=cwd,
        env=dict(clean, PYTHONPATH=path, **env),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


@pytest.mark.parametrize(
    'first',
    [
        'import timm',
        'import torch; import timm',
        'from timm.models import create_model',
        'from timm.models.resnet import ResNet',
        'import timm.data',
        'import torchvision; import timm',
        'import timm_senetv2; import timm',
        'import timm; import timm_senetv2',
        'from timm_senetv2 import CifarResNet',
        'from timm_senetv2.models import SmallCNN',
        'import timm_senetv2.models.senetv2',
        'from timm_senetv2.layers import ChannelAggregation; import timm',
    ],
)
def test_every_import_order_registers(first, tmp_path):
    code = f"""
        warnings.simplefilter('error', RuntimeWarning)
        {first}
        import timm
        model = timm.create_model('cifar_senetv2_resnet20')
        print(len(ours()), type(model).__name__)
    """
    stdout, stderr = fresh(code, cwd=tmp_path)
    assert stdout == f'{COUNT} CifarResNet'
    assert 'Warning' not in stderr


def test_explicit_import_registers_where_autoload_is_off(tmp_path):
    for variable in ('TORCH_DEVICE_BACKEND_AUTOLOAD', 'TIMM_SENETV2_AUTOLOAD'):
        stdout, stderr = fresh(
            """
            import timm
            print(len(ours()), 'timm_senetv2' in sys.modules, timm.is_model('senetv2_resnet50'))
            import timm_senetv2
            print(len(ours()), timm.is_model('senetv2_resnet50'))
        """,
            cwd=tmp_path,
            **{variable: '0'},
        )
        assert stdout.split('\n') == ['0 False False', f'{COUNT} True']
        assert 'Warning' not in stderr


def test_explicit_import_before_timm_registers_where_autoload_is_off(tmp_path):
    for first in ('import timm_senetv2', 'from timm_senetv2 import SmallCNN', 'from timm_senetv2.models import cifar'):
        stdout, stderr = fresh(f'{first}\nprint(len(ours()))', cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
        assert stdout == str(COUNT)
        assert 'Warning' not in stderr


def test_importing_the_package_imports_neither_torch_nor_timm(tmp_path):
    stdout, _ = fresh(
        """
        import timm_senetv2
        print(sorted({'torch', 'timm', 'torchvision', 'numpy'} & set(sys.modules)))
        print(sorted(timm_senetv2.__all__) == sorted(n for n in dir(timm_senetv2) if n in timm_senetv2.__all__))
    """,
        cwd=tmp_path,
    )
    assert stdout.split('\n') == ['[]', 'True']


def test_timm_finds_the_models_in_every_way_it_lists_them(tmp_path):
    stdout, _ = fresh(
        """
        import timm
        print(json.dumps(dict(
            wildcard=timm.list_models('*senetv2*'),
            module=timm.list_models(module='senetv2'),
            modules=timm.list_models(module='*'),
            is_model=[timm.is_model(n) for n in ('seanet20', 'small_saecnn', 'senextv2_50', 'senetv2_resnet51')],
            cfg=timm.get_pretrained_cfg('senetv2_resnet50').input_size,
            entry=timm.model_entrypoint('senetv2_resnet50').__module__,
            modules_listed=[m for m in timm.list_modules() if m in ('senetv2', 'cifar', 'small_cnn')],
        )))
    """,
        cwd=tmp_path,
    )
    found = json.loads(stdout)
    trunks224 = [f'senetv2_resnet{d}' for d in ('18', '34', '50', '101', '152', '152d')]
    trunks32 = [f'cifar_senetv2_resnet{d}' for d in (20, 32, 44, 56, 110)]
    assert sorted(found['wildcard']) == sorted(trunks224 + trunks32)
    assert sorted(n for n in found['module'] if n.startswith('senetv2')) == sorted(trunks224)
    assert sum(n.startswith('senextv2') for n in found['module']) == 9
    assert found['is_model'] == [True, True, True, False]
    assert found['cfg'] == [3, 224, 224]
    assert found['entry'] == 'timm_senetv2.models.senetv2'
    assert sorted(found['modules_listed']) == sorted(MODEL_MODULES)


def test_a_spawned_loader_worker_sees_the_models(tmp_path):
    # run as a script, since a spawned worker imports the main module again
    (tmp_path / 'main.py').write_text(
        textwrap.dedent("""
        import torch
        from torch.utils.data import DataLoader, Dataset

        class Names(Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, index):
                import timm
                return timm.create_model('cifar_senetv2_resnet20', num_classes=7 + index).num_classes

        if __name__ == '__main__':
            loader = DataLoader(Names(), batch_size=1, num_workers=1, multiprocessing_context='spawn')
            print([batch.item() for batch in loader])
    """)
    )
    result = subprocess.run([sys.executable, 'main.py'], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == '[7, 8]', result.stderr


# Put on the path as a module and imported first, these change timm right after its import and before our hook
BREAK_TIMM = """
    import wrapt
    @wrapt.when_imported('timm.models')
    def break_timm(models):
        del models.generate_default_cfgs
"""
TAKE_A_NAME = """
    import wrapt
    @wrapt.when_imported('timm.models')
    def take_a_name(models):
        def seanet20(pretrained=False, **kwargs):
            return models.create_model('resnet18', **kwargs)
        seanet20.__module__ = 'timm.models.resnet'
        models.register_model(seanet20)
"""


@pytest.mark.parametrize('autoload', ['0', '1'])
def test_a_timm_that_breaks_registration_costs_one_warning(autoload, tmp_path):
    stdout, _ = fresh(
        """
        import changed_timm
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            import torch, timm, timm_senetv2
        mine = [w for w in caught if 'timm_senetv2' in str(w.message)]
        print(len(mine), mine[0].category.__name__, mine[0].message)
        print(len(ours()), timm.create_model('resnet18', num_classes=3).num_classes)
    """,
        cwd=tmp_path,
        files={'changed_timm.py': BREAK_TIMM},
        TORCH_DEVICE_BACKEND_AUTOLOAD=autoload,
    )
    first, second = stdout.split('\n')
    assert first.startswith('1 RuntimeWarning timm_senetv2 could not register all of its models in timm: senetv2')
    assert 'generate_default_cfgs' in first and first.count('ImportError') == 1
    assert second == '0 3'


def test_a_name_that_timm_has_stays_timms_and_costs_one_warning(tmp_path):
    stdout, _ = fresh(
        """
        import changed_timm
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            import torch, timm, timm_senetv2
        mine = [w for w in caught if 'timm_senetv2' in str(w.message)]
        print(len(mine), 'timm already has seanet20 and keeps its own' in str(mine[0].message))
        print(len(ours()), type(timm.create_model('seanet20')).__name__, type(timm.create_model('seanet32')).__name__)
    """,
        cwd=tmp_path,
        files={'changed_timm.py': TAKE_A_NAME},
    )
    assert stdout.split('\n') == ['1 True', f'{COUNT - 1} ResNet CifarResNet']


def test_warnings_turned_into_errors_do_not_reach_the_import_of_timm(tmp_path):
    stdout, stderr = fresh(
        """
        import changed_timm
        import torch, timm
        print(len(ours()), timm.is_model('resnet18'))
    """,
        '-W',
        'error::RuntimeWarning',
        cwd=tmp_path,
        files={'changed_timm.py': BREAK_TIMM},
    )
    assert stdout == '0 True'
    assert stderr.count('RuntimeWarning: timm_senetv2 could not register') == 1


def test_a_package_that_cannot_be_imported_costs_one_warning_and_neither_torch_nor_timm(tmp_path):
    for options, where in ((), 'caught'), (('-W', 'error::RuntimeWarning'), 'stderr'):
        stdout, stderr = fresh(
            """
            sys.modules['timm_senetv2'] = None  # importing it raises ModuleNotFoundError, as if its folder were gone
            with warnings.catch_warnings(record=True) as caught:
                import torch, timm
            print([w.category.__name__ for w in caught if 'timm_senetv2 could not be loaded' in str(w.message)])
            print(torch.ones(2).sum().item())
        """,
            *options,
            cwd=tmp_path,
        )
        warned = "['RuntimeWarning']" if where == 'caught' else '[]'
        assert stdout.split('\n') == [warned, '2.0']
        assert stderr.count('RuntimeWarning: timm_senetv2 could not be loaded') == (where == 'stderr')


def test_threads_may_import_at_the_same_time(tmp_path):
    stdout, stderr = fresh(
        """
        import threading
        # timm itself does not survive two threads that enter it through different submodules
        statements = ['import timm', 'import timm_senetv2', 'import torch'] * 2
        errors = []
        start = threading.Barrier(len(statements))
        def run(statement):
            start.wait()
            try:
                exec(statement)
            except BaseException as e:
                errors.append(repr(e))
        threads = [threading.Thread(target=run, args=(s,)) for s in statements]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print(errors, len(ours()))
    """,
        cwd=tmp_path,
    )
    assert stdout == f'[] {COUNT}'
    assert 'Warning' not in stderr


def test_importing_again_and_reloading_change_nothing(tmp_path):
    stdout, stderr = fresh(
        """
        import importlib
        import timm, timm_senetv2
        from timm_senetv2 import registration
        before = ours()
        for _ in range(2):
            timm_senetv2.register()
            importlib.reload(timm_senetv2)
            importlib.reload(registration)
            registration.register()
        importlib.reload(timm.models)
        del sys.modules['timm_senetv2']
        import timm_senetv2
        print(ours() == before, len(before), type(timm.create_model('small_secnn')).__name__)
    """,
        cwd=tmp_path,
    )
    assert stdout == f'True {COUNT} SmallCNN'
    assert 'Warning' not in stderr


def test_the_hook_leaves_timm_models_as_it_was(tmp_path):
    stdout, _ = fresh(
        """
        import inspect
        import timm
        print(type(timm.models.__loader__).__name__, timm.models.__spec__.loader is timm.models.__loader__)
        print('generate_default_cfgs' in inspect.getsource(timm.models))
    """,
        cwd=tmp_path,
    )
    assert stdout.split('\n') == ['SourceFileLoader True', 'True']


def test_an_import_of_timm_that_failed_can_be_repeated(tmp_path):
    stdout, stderr = fresh(
        """
        import torch
        sys.modules['timm.models.resnet'] = None  # importing it raises, and with it timm.models
        try:
            import timm
        except ImportError:
            print('failed')
        del sys.modules['timm.models.resnet']
        import timm
        print(len(ours()))
    """,
        cwd=tmp_path,
    )
    assert stdout.split('\n') == ['failed', str(COUNT)]
    assert 'RuntimeWarning' not in stderr


def test_running_a_module_as_main_registers(tmp_path):
    (tmp_path / 'program.py').write_text(PRELUDE + 'print(len(ours()))')
    result = subprocess.run([sys.executable, '-m', 'program'], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == str(COUNT), result.stderr
