"""When and how the models reach timm's registry: every case in a fresh interpreter, as a user's program would.

What matters after the import of torch is tried in interpreters that have it already (tests/helpers/interpreters.py).
"""

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from interpreters import Interpreters

from timm_senetv2.registration import MODEL_MODULES

COUNT = 38  # models of this package
PRELUDE = """
import json, sys, warnings
def ours():
    import timm
    return timm.list_models(module=['senetv2', 'cifar', 'small_cnn'])
"""


# As with autoload turned off, in an interpreter that has torch
NO_FINDER = "sys.meta_path[:] = [finder for finder in sys.meta_path if 'Timm' not in repr(finder)]\n"


class Server:
    interpreters: Interpreters


@pytest.fixture(autouse=True, scope='module')
def server(interpreters) -> None:
    Server.interpreters = interpreters


def fresh(code: str, *options: str, cwd: Path, files: dict[str, str] | None = None, cold: bool = False, **env: str):
    """Run code in a fresh interpreter that has `files` on its path; returns what it passes to print, and stderr.

    It has imported torch and torchvision, with the autoload on, unless it is cold, or options or variables are given.
    """
    for name, content in (files or {}).items():
        (cwd / name).write_text(textwrap.dedent(content))
    code = PRELUDE + textwrap.dedent(code)
    path = [*filter(None, [env.pop('PYTHONPATH', os.environ.get('PYTHONPATH'))]), str(cwd)]
    clean = {k: v for k, v in os.environ.items() if not k.endswith('_AUTOLOAD')}
    if cold or options or env:
        environment = dict(clean, PYTHONPATH=os.pathsep.join(path), **env)
        command = [sys.executable, *options, '-c', code]
        result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    else:
        result = Server.interpreters.run(code, cwd, path=path, env=clean)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


ORDERS = (
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
)
COLD = {'import timm', 'from timm_senetv2 import CifarResNet'}  # in these two it is timm, or we, that imports torch
COLD_WEEKLY = {'from timm_senetv2 import CifarResNet'}  # the command starts so too, in test_install.py


def order(first: str, cold: bool, cwd: Path) -> None:
    code = f"""
        warnings.simplefilter('error', RuntimeWarning)
        {first}
        import timm
        model = timm.create_model('cifar_senetv2_resnet20')
        print(len(ours()), type(model).__name__)
    """
    stdout, stderr = fresh(code, cwd=cwd, cold=cold)
    assert stdout == f'{COUNT} CifarResNet'
    assert 'Warning' not in stderr


@pytest.mark.parametrize(
    'first', [pytest.param(first, marks=pytest.mark.slow if first in COLD_WEEKLY else ()) for first in ORDERS]
)
def test_every_import_order_registers(first, tmp_path):
    order(first, cold=first in COLD, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('first', [first for first in ORDERS if first not in COLD])
def test_every_import_order_registers_from_a_cold_start(first, tmp_path):
    order(first, cold=True, cwd=tmp_path)


LATE = """
    print(len(ours()), 'timm_senetv2' in sys.modules)
    import timm, timm_senetv2
    print(len(ours()), timm.is_model('senetv2_resnet50'))
"""


def test_explicit_import_registers_where_autoload_is_off(tmp_path):
    code = "import os, timm_senetv2_autoload\nos.environ['TIMM_SENETV2_AUTOLOAD'] = '0'\n"
    call = 'timm_senetv2_autoload.autoload()\n'  # as torch does
    stdout, stderr = fresh(NO_FINDER + code + call + textwrap.dedent(LATE), cwd=tmp_path)
    assert stdout.split('\n') == ['0 False', f'{COUNT} True']
    assert 'Warning' not in stderr


@pytest.mark.slow
def test_explicit_import_registers_where_autoload_is_off_from_a_cold_start(tmp_path):
    stdout, stderr = fresh(LATE, cwd=tmp_path, TIMM_SENETV2_AUTOLOAD='0')
    assert stdout.split('\n') == ['0 False', f'{COUNT} True']
    assert 'Warning' not in stderr


def test_explicit_import_registers_where_torchs_autoload_is_off(tmp_path):
    """In one process with torch, forked for each case."""
    first = ['import timm_senetv2', 'from timm_senetv2 import SmallCNN', 'from timm_senetv2.models import cifar']
    cases = [*(f'{statement}\nprint(len(ours()))' for statement in first), textwrap.dedent(LATE)]
    code = f"""
        import os, torch, torchvision
        for case in {cases!r}:
            if os.fork() == 0:
                exec(case)
                sys.stdout.flush()
                os._exit(0)
            assert os.wait()[1] == 0
    """
    stdout, stderr = fresh(code, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert stdout.split('\n') == [*[str(COUNT)] * 3, '0 False', f'{COUNT} True']
    assert 'Warning' not in stderr


def test_importing_the_package_imports_neither_torch_nor_timm(tmp_path):
    stdout, _ = fresh(
        """
        import timm_senetv2
        print(sorted({'torch', 'timm', 'torchvision', 'numpy'} & set(sys.modules)))
        print(sorted(timm_senetv2.__all__) == sorted(n for n in dir(timm_senetv2) if n in timm_senetv2.__all__))
    """,
        cwd=tmp_path,
        cold=True,
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


def test_a_module_run_as_main_and_its_spawned_loader_workers_see_the_models(tmp_path):
    # a file, since a spawned worker imports the main module again
    (tmp_path / 'program.py').write_text(
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
            import timm
            print(timm.is_model('senetv2_resnet50'))
    """)
    )
    code = "runpy.run_module('program', run_name='__main__', alter_sys=True)"  # as `python -m program`
    result = Server.interpreters.run(f"import runpy, sys; sys.argv = ['program']; {code}", tmp_path, path=[tmp_path])
    assert result.stdout.split('\n')[:2] == ['[7, 8]', 'True'], result.stderr


# Put on the path as a module and imported first, these change timm right after its import and before our hook, which
# stays the outer one, as where torch is imported after them
BREAK_TIMM = """
    import sys, wrapt
    @wrapt.when_imported('timm.models')
    def break_timm(models):
        del models.generate_default_cfgs
    sys.meta_path.sort(key=lambda finder: 'Timm' not in repr(finder))
"""
TAKE_A_NAME = """
    import sys, wrapt
    @wrapt.when_imported('timm.models')
    def take_a_name(models):
        def seanet20(pretrained=False, **kwargs):
            return models.create_model('resnet18', **kwargs)
        seanet20.__module__ = 'timm.models.resnet'
        models.register_model(seanet20)
    sys.meta_path.sort(key=lambda finder: 'Timm' not in repr(finder))
"""


@pytest.mark.parametrize('autoload', [False, True])
def test_a_timm_that_breaks_registration_costs_one_warning(autoload, tmp_path):
    code = """
        import changed_timm
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            import torch, timm, timm_senetv2
        mine = [w for w in caught if 'timm_senetv2' in str(w.message)]
        print(len(mine), mine[0].category.__name__, mine[0].message)
        print(len(ours()), timm.create_model('resnet18', num_classes=3).num_classes)
    """
    before = '' if autoload else NO_FINDER
    stdout, _ = fresh(before + textwrap.dedent(code), cwd=tmp_path, files={'changed_timm.py': BREAK_TIMM})
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
        warnings.simplefilter('error', RuntimeWarning)
        import torch, timm
        print(len(ours()), timm.is_model('resnet18'))
    """,
        cwd=tmp_path,
        files={'changed_timm.py': BREAK_TIMM},
    )
    assert stdout == '0 True'
    assert stderr.count('RuntimeWarning: timm_senetv2 could not register') == 1


@pytest.mark.parametrize('as_errors', [False, True])
def test_a_package_that_cannot_be_imported_costs_one_warning_and_neither_torch_nor_timm(as_errors, tmp_path):
    stdout, stderr = fresh(
        f"""
        sys.modules['timm_senetv2'] = None  # importing it raises ModuleNotFoundError, as if its folder were gone
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('{'error' if as_errors else 'always'}', RuntimeWarning)
            import torch, timm
        print([w.category.__name__ for w in caught if 'timm_senetv2 could not be loaded' in str(w.message)])
        print(torch.ones(2).sum().item())
    """,
        cwd=tmp_path,
    )
    assert stdout.split('\n') == ['[]' if as_errors else "['RuntimeWarning']", '2.0']
    assert stderr.count('RuntimeWarning: timm_senetv2 could not be loaded') == as_errors


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
        cold=True,
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


# ---- other import hooks, a timm imported anew, and whoever looks at timm's spec

# timm's own code fails some of typeguard's checks; only the hook matters here
TYPEGUARD = """
    import typeguard
    typeguard.config.typecheck_fail_callback = lambda error, memo: None
    class Finder(typeguard.TypeguardFinder):
        def should_instrument(self, module_name):
            return module_name in ('timm', 'timm.models')  # to rewrite all of timm takes ten times as long
    typeguard.install_import_hook('timm', cls=Finder)
"""


def test_models_are_registered_when_another_import_hook_answers_first(tmp_path):
    code = f"""
        import torch, torchvision.models.feature_extraction, huggingface_hub.hf_api, safetensors.torch
        {textwrap.indent(textwrap.dedent(TYPEGUARD), ' ' * 8).strip()}
        import timm
        print(len(ours()), type(timm.models.__loader__).__name__, type(timm.models.__spec__.loader).__name__)
        print(timm.create_model('cifar_senetv2_resnet20', num_classes=3).num_classes)
    """
    stdout, stderr = fresh(code, cwd=tmp_path)
    assert stdout.split('\n') == [f'{COUNT} TypeguardLoader TypeguardLoader', '3']
    assert 'Warning: timm_senetv2' not in stderr


@pytest.mark.parametrize('package_first', [False, True])
def test_bypassed_finder_is_made_up_for_by_an_explicit_call(package_first, tmp_path):
    stdout, _ = fresh(
        f"""
        import torch
        if {package_first}:
            import timm_senetv2
        del sys.meta_path[0]  # as if a hook before it answered for all of timm
        import timm
        print(len(ours()))
        import timm_senetv2
        if {package_first}:
            timm_senetv2.register()
        print(len(ours()), timm.is_model('senextv2_50'))
    """,
        cwd=tmp_path,
    )
    assert stdout.split('\n') == ['0', f'{COUNT} True']


def test_timm_imported_anew_gets_the_models_anew(tmp_path):
    stdout, stderr = fresh(
        """
        warnings.simplefilter('error')
        import timm, timm_senetv2.layers
        generations = [timm]
        layer = timm_senetv2.layers.SqueezeAggregatedExcitation
        for prefix in ('timm.', 'timm'):  # timm alone, then our package too
            for name in [name for name in sys.modules if f'{name}.'.startswith(prefix)]:
                del sys.modules[name]
            import timm
            generations.append(timm)
        for i, timm in enumerate(generations):
            entry = timm.model_entrypoint('senetv2_resnet18')
            print(
                len(timm.list_models(module=['senetv2', 'cifar', 'small_cnn'])),
                [entry is other.model_entrypoint('senetv2_resnet18') for other in generations].count(True),
                [isinstance(timm.create_model('senetv2_resnet18'), other.models.ResNet) for other in generations],
                any(isinstance(m, layer) for m in timm.create_model('seanet20').modules()),
            )
    """,
        cwd=tmp_path,
    )
    assert stdout.split('\n') == [
        f'{COUNT} 1 [True, False, False] True',
        f'{COUNT} 1 [False, True, False] True',
        f'{COUNT} 1 [False, False, True] False',
    ]


LOOK = """
    import importlib, importlib.resources, importlib.util, inspect, pickle, pkgutil
    def look():
        spec = importlib.util.find_spec('timm.models')
        direct = [f.find_spec('timm.models', timm.__path__) for f in sys.meta_path if hasattr(f, 'find_spec')]
        direct = [s for s in direct if s is not None]
        loader = spec.loader
        return [
            spec is getattr(sys.modules.get('timm.models'), '__spec__', None),
            [pickle.dumps(s.loader) == pickle.dumps(loader) for s in direct[-1:]],
            {s.loader.__class__.__name__ for s in direct} == {loader.__class__.__name__},
            all(s.loader == loader and loader == s.loader and s == direct[-1] for s in direct),
            repr(spec).split(' object')[0], vars(loader), isinstance(loader, importlib.machinery.SourceFileLoader),
            len(pkgutil.get_data('timm.models', '_hub.py')), loader.is_package('timm.models'),
            len(loader.get_source('timm.models')), pickle.loads(pickle.dumps(spec)).loader == loader,
        ]
"""


def test_nobody_sees_the_difference_in_timms_spec_and_loader(tmp_path):
    """Before, while and after `timm.models` is loaded, through importlib, pkgutil, inspect and pickle."""
    seen = [
        fresh(
            before
            + textwrap.dedent(LOOK)
            + textwrap.dedent("""
    import timm
    print(look(), type(timm.models.__loader__), timm.models.__loader__ is timm.models.__spec__.loader)
    print(len(inspect.getsource(timm.models)), (importlib.resources.files('timm.models') / '_hub.py').is_file())
    spec, facts = timm.models.__spec__, look()
    print(importlib.reload(timm.models) is timm.models, look() == facts, type(timm.models.__spec__.loader))
    del sys.modules['timm.models']
    print(look() == look(), look())
    spec = importlib.util.find_spec('timm.models')
    module = sys.modules['timm.models'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(type(module.__spec__.loader), type(module.__loader__), look())
    """),
            cwd=tmp_path,
        )[0]
        for before in (NO_FINDER, '')
    ]
    assert seen[0] == seen[1]
    assert 'SourceFileLoader' in seen[0]


def test_other_loaders_are_left_as_they_are(tmp_path):
    """A timm in a zip file, and wrapt's hooks around ours and inside it; timm is a stand-in without our needs."""
    with zipfile.ZipFile(tmp_path / 'timm.zip', 'w') as archive:
        archive.writestr('timm/__init__.py', 'from . import models')
        archive.writestr('timm/models/__init__.py', 'import pkgutil; data = pkgutil.get_data(__name__, "data.txt")')
        archive.writestr('timm/models/data.txt', 'text')
    code = """
        sys.path.insert(0, 'timm.zip')
        import timm_senetv2_autoload, importlib.util, pickle, pkgutil
        hooked = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            if WRAPT == 'inside':
                import wrapt
                wrapt.register_post_import_hook(hooked.append, 'timm.models')
            if AUTOLOAD:
                timm_senetv2_autoload.autoload()
            if WRAPT == 'around':
                import wrapt
                wrapt.register_post_import_hook(hooked.append, 'timm.models')
            import timm
        spec = importlib.util.find_spec('timm.models')
        print(timm.models.data, pkgutil.get_data('timm.models', 'data.txt'), len(hooked))
        print(spec.loader.__class__, timm.models.__loader__.__class__, spec is timm.models.__spec__)
        print(type(spec.loader), type(timm.models.__loader__), len(pickle.dumps(spec)))
        print(sum('could not register' in str(w.message) for w in caught), file=sys.stderr)
    """
    for wrapt in ('', 'inside', 'around'):
        seen = [
            fresh(f'WRAPT, AUTOLOAD = {wrapt!r}, {autoload}\n' + textwrap.dedent(code), cwd=tmp_path, cold=True)
            for autoload in (False, True)
        ]
        assert seen[0][0] == seen[1][0]
        assert [stderr.strip() for _, stderr in seen] == ['0', '1']


def test_import_of_torch_loads_one_small_module(tmp_path):
    stdout, _ = fresh(
        """
        before = set(sys.modules)
        import timm_senetv2_autoload
        print(sorted(n for n in set(sys.modules) - before if n.split('.')[0] not in sys.stdlib_module_names))
        import torch
        print([n for n in sys.modules if n.startswith('timm')], len([f for f in sys.meta_path if 'Timm' in repr(f)]))
    """,
        cwd=tmp_path,
        cold=True,
    )
    assert stdout.split('\n') == ["['timm_senetv2_autoload']", "['timm_senetv2_autoload'] 1"]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='a system without fork')
def test_a_forked_process_registers_for_itself(tmp_path):
    stdout, _ = fresh(
        """
        import os, torch
        if os.fork() == 0:
            print(len(ours()), flush=True)
            os._exit(0)
        print(os.wait()[1], len(ours()))
    """,
        cwd=tmp_path,
    )
    assert stdout.split('\n') == [str(COUNT), f'0 {COUNT}']


def test_without_the_site_module(tmp_path):
    path = os.pathsep.join(sys.path)
    code = "import torch; print(len([f for f in sys.meta_path if 'Timm' in repr(f)]))"
    stdout, stderr = fresh(code, '-S', cwd=tmp_path, PYTHONPATH=path)
    assert stdout == '1'
    assert 'RuntimeWarning' not in stderr
