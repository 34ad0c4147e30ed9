"""The package's own names: what an editor sees without running it is what a program gets."""

import ast
import importlib
from pathlib import Path

import pytest

import timm_senetv2

SOURCE = ast.parse(Path(timm_senetv2.__file__).read_text())


def static_imports() -> dict[str, str]:
    """Name to submodule, as type checkers read them."""
    block = next(n for n in SOURCE.body if isinstance(n, ast.If) and ast.unparse(n.test) == 'TYPE_CHECKING')
    # `import x as x` is what marks a name as public in a typed package
    return {a.asname: n.module for n in block.body for a in n.names if a.name == a.asname}


def test_every_public_name_is_known_without_running_the_package():
    assert {*static_imports(), 'register'} == set(timm_senetv2.__all__)
    assert (Path(timm_senetv2.__file__).parent / 'py.typed').is_file()


@pytest.mark.parametrize('name, module', static_imports().items())
def test_lazy_name_is_what_the_type_checker_says(name, module):
    assert getattr(timm_senetv2, name) is getattr(importlib.import_module(f'timm_senetv2.{module}'), name)
    assert name in dir(timm_senetv2)


def test_unknown_name_raises_as_in_any_module():
    with pytest.raises(AttributeError, match="module 'timm_senetv2' has no attribute 'SENet'"):
        timm_senetv2.SENet  # noqa: B018
