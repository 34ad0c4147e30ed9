"""The bytes that a step reads and writes, and the least time that those which attention adds take.

A step that only moved them, as fast as this machine copies, would be the fastest that a network with attention can be
beside the one without: the floor that a measured speed is compared with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import timm
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from timm_senetv2.errors import UserError

from ..files import read_csv
from .contestants import Setting, model_contestant
from .timing import Contestant, machine, measure

PLAIN, SE, OURS = MODELS = ('resnet50', 'seresnet50', 'senetv2_resnet50')
COLUMNS = (
    'setting',
    'contestant',
    'mib',
    'operations',
    'copy_mib_per_s',
    'machine',
    'threads',
    'torch',
    'timm',
    'command',
)
_NOTHING_MOVED = ('aten::empty', 'aten::detach', 'aten::_local_scalar')  # and views


class Counter(TorchDispatchMode):
    """Adds up the bytes of the tensors that torch's operations take and return; an operation in place counts both.

    Attributes:
        moved: Bytes.
        operations: Operations that move any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(_NOTHING_MOVED):
            self.moved += _bytes((args, kwargs)) + _bytes(result)
            self.operations += 1
        return result


def _bytes(tree: Any) -> int:
    tensors = {id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}.values()
    # what is expanded, as a gate is to the pixels of its channel, lies in memory once
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def count(spec: str, setting: Setting) -> tuple[int, int | None]:
    """Bytes and operations of a step, as torch dispatches it; compiled, the bytes of the compiler's own account.

    Raises:
        UserError: A compiler that keeps no such account.
    """
    contestant = model_contestant(spec, setting)
    counter = Counter()
    if setting.runtime == 'eager':
        contestant.step()  # makes the optimizer's state
        # The block would see the counter, and run as timm's does
        with patch('timm_senetv2.models.fused.is_observed', lambda: False), counter:
            contestant.step()
        return counter.moved, counter.operations
    from torch._inductor import config, metrics

    metrics.reset()
    # without a reader of its log, it counts nothing
    log = patch('torch._inductor.compile_fx.inductor_metrics_log', Mock(**{'isEnabledFor.return_value': True}))
    with log, config.patch(force_disable_caches=True):
        contestant.step()
    if not metrics.num_bytes_accessed:
        raise UserError(f'torch {torch.__version__} does not count the bytes of what it compiles')
    with _around_optimizers(counter):
        contestant.step()
    return metrics.num_bytes_accessed + counter.moved, None


@contextmanager
def _around_optimizers(counter: Counter) -> Iterator[None]:
    """Count what optimizers do, which are not compiled."""
    hooks = [
        register_optimizer_step_pre_hook(lambda *args: counter.__enter__() and None),
        register_optimizer_step_post_hook(lambda *args: counter.__exit__(None, None, None)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def copy_rate(rounds: int = 25) -> float:
    """Bytes that this machine reads and writes in a second while it copies a tensor larger than its caches."""
    a, b = torch.ones(2**26), torch.ones(2**26)  # 256 MiB each
    step = Contestant(lambda: b.copy_(a))
    return 2 * a.nbytes / min(measure({'copy': step}, rounds, 'cpu', 'copy')['copy'])


def settings(quick: bool) -> list[Setting]:
    """Those of the benchmark on a CPU in NCHW: the layout changes how fast bytes move, and not which."""
    base = Setting(batch=2, size=64) if quick else Setting()
    half, inductor = replace(base, dtype='bfloat16'), replace(base, runtime='compiled')
    batches = (1, base.batch)
    return [
        *(replace(s, batch=batch) for s in (base, half, inductor) for batch in batches),
        *(replace(s, training=True) for s in (base, half, inductor)),
    ]


def measure_all(quick: bool, command: str) -> list[dict[str, Any]]:
    """Rows of the file."""
    rate = copy_rate(3 if quick else 25)
    shared = dict(
        copy_mib_per_s=f'{rate / 2**20:.0f}',
        machine=machine('cpu'),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
        command=command,
    )
    rows = []
    for setting in tqdm(settings(quick), desc='traffic', disable=None):
        for spec in MODELS:
            torch.compiler.reset()
            moved, operations = count(spec, setting)
            own = dict(setting=str(setting), contestant=spec, mib=f'{moved / 2**20:.1f}')
            rows.append(own | dict(operations='' if operations is None else operations) | shared)
    return rows


def table(path: Path, speeds: Path) -> str:
    """Markdown: what attention adds in each setting, the floor that follows, and the speed that was measured.

    Args:
        path: What `write` wrote.
        speeds: The benchmark's medians, where the times of the network without attention stand.
    """
    rows = read_csv(path)
    by_setting: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        by_setting.setdefault(row['setting'], {})[row['contestant']] = row
    measured = {
        (row['experiment'].removeprefix('models, '), row['contestant']): row
        for row in read_csv(speeds)
        if row['baseline'] == PLAIN
    }
    lines = [
        '| | bytes, MiB | added by SE | by SaE | operations added | at the rate of a copy, ms | floor | measured |',
        '|---|--:|--:|--:|--:|--:|--:|--:|',
    ]
    for setting, counted in by_setting.items():
        if (setting, OURS) not in measured:
            continue
        mib = {name: float(counted[name]['mib']) for name in MODELS}
        added = mib[OURS] - mib[PLAIN]
        more = (
            int(counted[OURS]['operations']) - int(counted[PLAIN]['operations']) if counted[OURS]['operations'] else ''
        )
        seconds = added / float(counted[OURS]['copy_mib_per_s'])
        plain_seconds = float(measured[setting, PLAIN]['ms']) / 1e3
        cells = [
            f'{mib[PLAIN]:.0f}',
            f'{mib[SE] - mib[PLAIN]:.0f}',
            f'{added:.0f}',
            more,
            f'{seconds * 1e3:.1f}',
            f'{plain_seconds / (plain_seconds + seconds):.3f}',
            f'{float(measured[setting, OURS]["ratio"]):.3f}',
        ]
        lines.append(f'| {setting} | {" | ".join(map(str, cells))} |')
    first = rows[0]
    return '\n'.join(
        [
            *lines,
            '',
            f'Counted with `{first["command"]}` on {first["machine"]}, {first["threads"]} threads, torch '
            f'{first["torch"]}, timm {first["timm"]}; a copy of 256 MiB moves '
            f'{float(first["copy_mib_per_s"]) / 1024:.1f} GiB a second.',
        ]
    )
