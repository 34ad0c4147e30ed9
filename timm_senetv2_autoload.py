"""What `import torch` calls at its end (entry point group `torch.backends`) to announce timm_senetv2.

A module of its own, outside the package, because the package registers its models when it is imported: torch has to
import whatever holds the entry point, and with `TIMM_SENETV2_AUTOLOAD=0` that must not import the package.
"""

import os
import sys
import warnings


def autoload() -> None:
    """Register the models in timm, now or when timm is imported. Never raises: torch would then fail to import."""
    if os.environ.get('TIMM_SENETV2_AUTOLOAD') == '0':
        return
    try:
        from timm_senetv2 import register

        register()
    except Exception as e:
        warn(
            f'timm_senetv2 could not be loaded, its models are not in timm: {type(e).__name__}: {e}. '
            'Reinstall it, or set TIMM_SENETV2_AUTOLOAD=0 to silence this.'
        )


def warn(message: str) -> None:
    """Issue a RuntimeWarning; where warnings are errors, print it, for no error may reach `import torch` or timm."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        print(f'RuntimeWarning: {message}', file=sys.stderr)
