"""A Hugging Face Space that serves the page."""

import os
from importlib.metadata import PackageNotFoundError, version

import yaml
from timm.models import get_pretrained_cfg

from .. import __version__
from ..errors import UserError, printable
from ..files import check_output, output_folder
from .choices import Choices
from .settings import Settings

_APP = '''\
"""The page of timm-senetv2: https://huggingface.co/docs/hub/spaces-sdks-gradio"""

from timm_senetv2.demo import Settings, serve

MODELS = {models}

if __name__ == '__main__':
    serve(Settings(models=MODELS, allow_hub={allow_hub}, host='0.0.0.0', port=7860, timeout={timeout}))
'''
_README = """\
---
{front}---

# Channel attention on your image

Choose a model, give an image, and see the most probable classes, the gates of each block and where in the image the
class is seen. Written by `timm-senetv2 demo --space`.

Visitors can choose from these models{hub}:

{models}

To publish it, create a Space with the SDK Gradio, and then:

```bash
hf upload OWNER/NAME . . --repo-type space
```
"""


def write_space(out: str | os.PathLike[str], settings: Settings, package: str | None = None) -> None:
    """Write app.py, requirements.txt and README.md with a Space's front matter.

    Args:
        out: A new folder, or one that this wrote and nobody changed.
        settings: `models`, `allow_hub` and `timeout` are for the Space; host and port are the Hub's.
        package: The line of requirements.txt that brings this package; None for this version from the package index.

    Raises:
        UserError: A folder of this machine among the models, or an `out` that cannot be written.
    """
    check_output(out, 'demo')
    choices = Choices(settings.models, settings.allow_hub, public=True)
    names = [choice.name for choice in choices.all]
    for name in names:
        if name.startswith('local-dir:'):
            raise UserError(
                f'{printable(name)} is on this machine and not in the Space; put it on the Hub with timm-senetv2 push, '
                'and give hf-hub:OWNER/NAME'
            )
    if package is None:
        package = f'timm-senetv2[demo]=={__version__}'
    elif not package.isprintable() or not package.strip() or package.startswith('-'):
        raise UserError(f'--package: {printable(package)!r} is not one line of a requirements.txt')
    try:
        gradio = version('gradio')
    except PackageNotFoundError:
        raise UserError("the Space needs to know Gradio's version: pip install 'timm-senetv2[demo]'") from None
    sources = [source for name in names if (source := _on_the_hub(name))]
    front = dict(
        title='Channel attention on your image',
        sdk='gradio',
        sdk_version=gradio,
        app_file='app.py',
        license='apache-2.0',
        short_description='Classes, gates and activation maps of SENetV2 models',
    )
    listed = dict(models=sources, preload_from_hub=[*sources]) if sources else {}  # a copy, else YAML writes an alias
    texts = {
        'app.py': _APP.format(
            models='[\n' + ''.join(f'    {name!r},\n' for name in names) + ']',
            allow_hub=settings.allow_hub,
            timeout=settings.timeout,
        ),
        'requirements.txt': '--extra-index-url https://download.pytorch.org/whl/cpu\ntorch\n' + package + '\n',
        'README.md': _README.format(
            front=yaml.safe_dump({**front, **listed}, sort_keys=False, allow_unicode=True),
            hub=', or type the name of another one of this package on the Hub' if settings.allow_hub else '',
            models='\n'.join(f'- `{name}`' for name in names),
        ),
    }
    with output_folder(out, 'demo') as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding='utf-8', newline='\n')


def _on_the_hub(name: str) -> str | None:
    """The repository on the Hub that a choice is downloaded from; None for what this package carries."""
    if name.startswith('hf-hub:'):
        return name.removeprefix('hf-hub:').partition('@')[0]
    cfg = get_pretrained_cfg(name)
    return cfg.hf_hub_id if cfg is not None and not cfg.file else None
