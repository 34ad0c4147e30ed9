"""docs/upstream-num-classes.md: the report holds for the installed timm and transformers, and for no model of ours."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from integrations import ROOT, environment, need, record

pytestmark = pytest.mark.integration
PAGE = ROOT / 'docs' / 'upstream-num-classes.md'


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Without our package: with torch's autoload off, no entry point of ours is called."""
    code = f"import sys\n{code}\nassert not any(name.startswith('timm_senetv2') for name in sys.modules)\n"
    return subprocess.run(
        [sys.executable, '-c', code],
        env=environment(folder) | dict(TORCH_DEVICE_BACKEND_AUTOLOAD='0'),
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_report_is_as_it_happens(tmp_path):
    need('transformers', 'transformers')
    page = PAGE.read_text(encoding='utf-8')
    failing, mended = re.findall(r'^```python\n(.*?)^```$', page, flags=re.M | re.S)
    (last,) = re.findall(r'^```text\n(.*?)\n```$', page, flags=re.M | re.S)
    done = run(failing, tmp_path)
    shown = done.stderr.splitlines()[-1]
    call = 'timm.models.save_for_hf, then TimmWrapperForImageClassification.from_pretrained'
    result = f'fails without us too: {shown.split("modeling_timm_wrapper.")[-1]}' if done.returncode else 'loads'
    record('consumer', 'transformers', version('transformers'), call, "timm's resnet18", result)
    assert shown == last
    imports, _ = failing.split('\n\n')
    done = run(f'{imports}\n{mended}', tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / 'saved')
