"""What SECURITY.md promises and no other test tries: no network at import, loopback by default."""

import importlib
import subprocess
import sys

import pytest

from timm_senetv2.commands import COMMANDS, main

IMPORTS = """
import sys

asked = []

def hook(event, args):
    if event in {'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto', 'urllib.Request'}:
        asked.append((event, args))
        raise OSError('no network here')

sys.addaudithook(hook)
import torch, timm, timm_senetv2, pkgutil, importlib

for module in pkgutil.walk_packages(timm_senetv2.__path__, 'timm_senetv2.'):
    if not module.name.endswith('.__main__'):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as e:  # an extra that is not installed
            assert not e.name.startswith('timm_senetv2')
timm.create_model('small_cnn')
timm.create_model('cifar_senetv2_resnet20.fmnist', pretrained=True)
assert 'senetv2_resnet50' in timm.list_models()
print(asked)
import socket
try:
    socket.create_connection(('127.0.0.1', 9))
except OSError:
    print(len(asked))
"""


def test_importing_torch_timm_and_every_module_of_ours_asks_for_no_network(tmp_path):
    done = subprocess.run([sys.executable, '-c', IMPORTS], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '[]\n1\n'  # and the hook does see a connection


@pytest.mark.skipif('demo' not in COMMANDS, reason='this version has no demo')
def test_demo_listens_on_loopback_by_default(capsys):
    importlib.import_module('timm_senetv2.commands.demo')
    with pytest.raises(SystemExit):
        main(['demo', '--help'])
    assert '127.0.0.1' in capsys.readouterr().out
