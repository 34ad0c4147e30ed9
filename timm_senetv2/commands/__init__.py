"""The command `timm-senetv2`, the same as `python -m timm_senetv2`. A module for each of its subcommands."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn, Protocol, cast

from .. import __version__
from ..errors import UserError, did_you_mean, printable, run

Extras = Mapping[str, Mapping[str, Sequence[str]]]  # by command: extra, packages
PROG = 'timm-senetv2'
COMMANDS = {
    'models': 'list the models: tags, accuracies, parameters, multiply-adds',
    'convert': 'convert a checkpoint into a folder that timm loads',
    'push': 'put a model on the Hugging Face Hub',
    'cards': 'write the model cards of all released weights',
    'gates': 'measure and draw what the attention of a model does on your images',
    'train': "run timm's own train.py, validate.py and others",
    'demo': 'serve a page to play with: an image, a model, its gates',
}
# Packages that a subcommand needs and that the package itself does not, by the extra that brings them
EXTRAS: Extras = {
    'push': {'hub': ('jinja2', 'pydantic')},
    'cards': {'hub': ('jinja2', 'pydantic')},
    'gates': {'gates': ('matplotlib',)},
    'demo': {'demo': ('gradio', 'pytorch_grad_cam')},
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors of this project."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message}; {self.prog} --help says more')


class _Command(Protocol):
    def main(self, argv: Sequence[str]) -> int | None: ...


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a subcommand and exit; see `timm_senetv2.errors.run` for the codes."""
    run(lambda: _main(sys.argv[1:] if argv is None else argv))


def need(extras: Mapping[str, Sequence[str]], what: str) -> None:
    """Make sure that the packages of these extras are installed.

    Raises:
        UserError: One is not; says how to install it.
    """
    for extra, packages in extras.items():
        lacking = [package for package in packages if find_spec(package) is None]
        if lacking:
            raise UserError(f"{what} needs {' and '.join(lacking)}: pip install 'timm-senetv2[{extra}]'")


def _main(argv: Sequence[str]) -> int | None:
    lines = '\n'.join(f'  {name:8} {summary}' for name, summary in COMMANDS.items())
    parser = Parser(
        prog=PROG,
        usage=f'{PROG} [--help] [--version] COMMAND ...',
        description=f'SENetV2, SEneXtV2 and SEANet for timm.\n\ncommands:\n{lines}',
        epilog=f'{PROG} COMMAND --help says what a command takes.',
    )
    parser.add_argument('--version', action='version', version=f'{PROG} {__version__}')
    first, rest = argv[:1], argv[1:]
    if not first or first[0].startswith('-'):
        parser.parse_args(first or ['--help'])
    name = first[0]
    if name not in COMMANDS:
        raise UserError(
            f'there is no command {printable(name)!r}{did_you_mean(name, COMMANDS)}; {PROG} --help lists them'
        )
    if not {'-h', '--help'} & set(rest):
        need(EXTRAS.get(name, {}), f'{PROG} {name}')
    return cast(_Command, import_module(f'.{name}', __name__)).main(rest)
