"""The whole circle through the command and the environment alone, each step in a process of its own.

Where it can make no difference such a process has torch already, and nothing that reads the environment of the Hub.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from interpreters import command as code_of
from safetensors.torch import save, save_file

TOKEN = 'hf_sentinelSENTINELsentinel'
LOGITS = """
import sys, timm, torch
{load}
torch.manual_seed(7)
with torch.inference_mode():
    torch.save(model.eval()(torch.randn(2, *model.pretrained_cfg['input_size'])), sys.argv[1])
"""


@pytest.fixture
def process(hub_server, tmp_path, interpreters):
    """Run Python with the loopback Hub as the Hub, a cache of its own, and the token."""
    hub_server.tokens[TOKEN] = 'write'

    def process(*args, check=True, cold=False, **env):
        given = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
        own = dict(HF_ENDPOINT=hub_server.url, HF_HOME=str(tmp_path / 'hf'), HF_HUB_DISABLE_XET='1', HF_TOKEN=TOKEN)
        if cold:
            command = [sys.executable, *map(str, args)]
            done = subprocess.run(command, env={**given, **own, **env}, capture_output=True, text=True)
        else:
            given_code = args[0] == '-c' and f'import sys\nsys.argv[1:] = {[str(a) for a in args[2:]]}\n{args[1]}'
            done = interpreters.run(given_code or code_of(args), env={**given, **own, **env})
        assert not check or done.returncode == 0, done.stderr
        return done

    return process


def test_push_then_load_by_the_printed_line_then_load_offline(hub_server, process, tmp_path):
    model = timm.create_model('cifar_senetv2_resnet20')
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    pushed = process(
        '-m',
        'timm_senetv2',
        'push',
        '--model',
        'cifar_senetv2_resnet20',
        '--checkpoint',
        tmp_path / 'last.pth.tar',
        '--license=mit',
        '--repo-id',
        'me/x.mine',
        '--private',
        '-v',
        cold=True,
        HF_DEBUG='1',
    )
    assert 'curl' in pushed.stderr  # the client did log its requests
    assert TOKEN not in pushed.stdout + pushed.stderr
    line = pushed.stdout.splitlines()[-1]
    assert line == "model = timm.create_model('hf-hub:me/x.mine', pretrained=True)"
    assert not any(Path(tmp_path, 'hf').rglob('model.safetensors'))  # compared in a cache of its own

    process('-c', LOGITS.format(load=line), tmp_path / 'online.pt')
    process(
        '-c', LOGITS.format(load=line), tmp_path / 'offline.pt', HF_HUB_OFFLINE='1', HF_ENDPOINT='http://127.0.0.1:9'
    )
    torch.manual_seed(7)
    with torch.inference_mode():
        expected = model.eval()(torch.randn(2, 3, 32, 32))
    assert torch.equal(torch.load(tmp_path / 'online.pt'), expected)
    assert torch.equal(torch.load(tmp_path / 'offline.pt'), expected)


def test_failed_push_is_one_line_and_never_shows_the_token(hub_server, process, tmp_path):
    save_file(timm.create_model('small_cnn').state_dict(), tmp_path / 'w.safetensors')
    command = (
        '-m',
        'timm_senetv2',
        'push',
        '--model',
        'small_cnn',
        '--checkpoint',
        tmp_path / 'w.safetensors',
        '--license=mit',
        '--repo-id',
    )
    # a Hub that repeats the token in its answer
    hub_server.fault('POST', '/commit/', times=2, status=418, headers={'X-Error-Message': f'no coffee for {TOKEN}'})
    quiet = process(*command, 'me/x', check=False)
    assert quiet.returncode == 2 and quiet.stdout == ''
    lines = [line for line in quiet.stderr.splitlines() if line and 'safetensors:' not in line]  # but for the bar
    assert len(lines) == 1
    assert lines[0].startswith(
        'error: could not commit the files: the Hub refuses it (status 418): no coffee for <token>'
    )

    loud = process(*command, 'me/x', '-v', check=False, HF_DEBUG='1')
    assert loud.returncode == 2 and 'Traceback' in loud.stderr
    assert TOKEN not in quiet.stderr + loud.stdout + loud.stderr
    assert not re.search('model.safetensors', str(hub_server.model('me/x').files()))


def test_lifted_model_comes_from_its_source_on_the_hub(hub_server, process):
    source = timm.create_model('seresnext26d_32x4d')
    hub_server.add_repo('timm/seresnext26d_32x4d.bt_in1k', {'model.safetensors': save(source.state_dict())})
    done = process(
        '-c',
        """
import timm, torch
ours = timm.create_model('senextv2_26d_32x4d', pretrained=True).eval()
source = timm.create_model('seresnext26d_32x4d', pretrained=True).eval()
images = torch.randn(1, 3, 224, 224)
with torch.inference_mode():
    print(type(ours.layer1[0].se).__name__, (ours(images) - source(images)).abs().max().item())
""",
    )
    layer, difference = done.stdout.split()
    assert layer == 'SqueezeAggregatedExcitation' and float(difference) <= 1e-4
    assert ('HEAD', '/timm/seresnext26d_32x4d.bt_in1k/resolve/main/model.safetensors') in hub_server.requests
