"""Libraries that build on timm take our models by name, or from the folder that `timm-senetv2 push` writes."""

import pytest
import timm
import torch
from consumers import CLASSES, NAME, Consumer, build
from integrations import fresh, need, record
from PIL import Image

from timm_senetv2.hub import Facts, render_card, write_files

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
MODULES = {
    'segmentation-models-pytorch': 'segmentation_models_pytorch',
    'grad-cam': 'pytorch_grad_cam',
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """What consumers.py needs: the folder of a model, an image, and the logits of that image."""
    folder = tmp_path_factory.mktemp('consumers')
    model = build().eval()
    facts = Facts(labels=['cat', 'dog', 'owl', 'yak'])
    assert len(facts.labels) == CLASSES
    write_files(model, folder / 'saved', render_card(model, 'me/x', facts), facts)
    noise = torch.randint(0, 256, (300, 260, 3), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy()).resize((26, 30)).resize((260, 300))
    image.save(folder / 'image.png')
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = transform(image)[None]
    with torch.no_grad():
        torch.save((x, model(x)), folder / 'expected.pt')
    return folder


@pytest.mark.parametrize('name', Consumer.every)
def test_library_takes_our_models(name, saved):
    one = Consumer.every[name]
    need(one.library, MODULES.get(one.library, one.library))
    [row] = fresh('consumers.py', name, saved)
    result = row.get('result') or f'fails: {row["failure"]}'
    record(
        'consumer',
        one.library,
        row['version'],
        one.call,
        'senetv2_resnet50' if 'resnet50' in one.call else NAME,
        result,
    )
    assert 'failure' not in row, row['failure']
