"""What makes the numbers in results/: data, one training loop, grids of runs, statistics, tables and pictures.

A package of this repository, not of the wheel. The scripts in scripts/ parse their command line and call it.
"""

from importlib.util import find_spec

from timm_senetv2.errors import UserError

_NEEDED = {'torch': 'torch', 'timm': 'timm', 'matplotlib': 'matplotlib', 'sklearn': 'scikit-learn', 'tqdm': 'tqdm'}
_lacking = [package for module, package in _NEEDED.items() if find_spec(module) is None]
if _lacking:  # said before anything runs for hours
    raise UserError(f'{", ".join(_lacking)} is not installed; in the clone: pip install -e ".[experiments]"')
