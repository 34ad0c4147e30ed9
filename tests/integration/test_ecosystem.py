"""Libraries that build on timm take our models by name, or as `timm-senetv2 push` writes them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from consumers import CLASSES, NAME, REPO, Consumer, build
from hub_server import HubServer
from integrations import environment, fresh, need, record
from PIL import Image

pytestmark = pytest.mark.integration
MODULES = {
    'segmentation-models-pytorch': 'segmentation_models_pytorch',
    'grad-cam': 'pytorch_grad_cam',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """What consumers.py needs, but for the Hub: a model and its checkpoint, an image, and the logits of that image."""
    folder = tmp_path_factory.mktemp('consumers')
    model = build().eval()
    torch.save(model.state_dict(), folder / 'checkpoint.pth')
    labels = ['cat', 'dog', 'owl', 'yak']
    assert len(labels) == CLASSES
    (folder / 'facts.yaml').write_text(f'labels: [{", ".join(labels)}]\nlicense: mit')
    push(folder, '--dry-run', folder / 'saved')
    noise = torch.randint(0, 256, (300, 260, 3), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy()).resize((26, 30)).resize((260, 300))
    image.save(folder / 'image.png')
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = transform(image)[None]
    with torch.no_grad():
        torch.save((x, model(x)), folder / 'expected.pt')
    return folder


@pytest.fixture(scope='module')
def hub(folder) -> Iterator[HubServer]:
    """A Hub on loopback, to which `timm-senetv2 push` brought the model."""
    with HubServer({'hf_token': 'write'}) as server:
        push(folder, hub=server.url)
        yield server


def push(folder: Path, *arguments: object, hub: str | None = None) -> None:
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'timm_senetv2', 'push', '--model', NAME, '--num-classes', str(CLASSES)),
            *('--checkpoint', folder / 'checkpoint.pth', '--card', folder / 'facts.yaml', '--repo-id', REPO),
            *arguments,
        ],
        env=environment(folder, hub) | dict(HF_TOKEN='hf_token'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('name', Consumer.every)
def test_library_takes_our_models(name, folder, tmp_path, request):
    one = Consumer.every[name]
    need(one.library, MODULES.get(one.library, one.library))
    server = request.getfixturevalue('hub') if one.hub else None
    before = len(server.requests) if server else 0
    [row] = fresh('consumers.py', name, folder, tmp_path, server and server.url)
    result = row.get('result') or f'fails: {row["failure"]}'
    record('consumer', one.library, row['version'], one.call, one.model, result)
    assert 'failure' not in row, row['failure']
    if server:
        asked = {path for method, path in server.requests[before:] if method == 'GET' and path.startswith(f'/{REPO}/')}
        assert any(path.endswith('/config.json') for path in asked), asked
        assert any(path.startswith('/cdn/') for _, path in server.requests[before:]), 'no weights were fetched'
