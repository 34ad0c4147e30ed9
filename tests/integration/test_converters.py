"""Whatever converts timm's seresnet50 converts senetv2_resnet50, also reparameterized, with equal logits."""

import math

import pytest
from converters import IMAGES, MODELS, Converter
from integrations import fresh, need, record

pytestmark = pytest.mark.integration
MODULES = {'onnx': 'onnxscript'}  # what shows that the library is there, where its own name does not


@pytest.mark.parametrize('name', Converter.every)
def test_what_converts_timms_model_converts_ours(name, tmp_path):
    one = Converter.every[name]
    need(one.library, MODULES.get(one.library, one.library))
    found = {row['model']: row for row in fresh('converters.py', name, tmp_path, tmp_path)}
    assert found.keys() == MODELS.keys()
    for label, row in found.items():
        record('converter', one.library, row['version'], one.call, _words(label), _result(row))
    if 'failure' in found['timm']:
        pytest.xfail(f'timm: {found["timm"]["failure"]}')
    for label in ('ours', 'reparameterized'):
        row = found[label]
        assert 'failure' not in row, f'{label}: {row["failure"]}'
        if one.paired:
            assert_as_good(row, found['timm'])
        elif one.runs:
            bound = row['bound']
            if one.bits == 8:  # these models have wider ranges than six standard deviations, timm's too
                bound = max(bound, 1.25 * found['timm']['error'])
            assert row['lost'] > bound, 'the check could not tell a model without attention'
            assert row['error'] <= bound, label
        if 'growth' in row:  # of the file, by slimming it
            assert row['growth'] <= max(0, found['timm']['growth']) + 0.001
        if 'parts' in row:  # of the graph that XNNPACK runs, between which ExecuTorch's own slow kernels do
            assert row['parts'] == found['timm']['parts'] == 1
        if 'operations' in row:  # SE's layers are 1x1 convs, and SaE's are linear
            assert set(row['operations']) - set(found['timm']['operations']) <= {'linear', 'expand_dims', 'reshape'}


def assert_as_good(row: dict, timms: dict) -> None:
    """The same function as timm's model, on the same images: as close to its float original, image by image."""
    assert len(row['errors']) == len(timms['errors']) == IMAGES
    ratio = math.exp(sum(math.log(a / b) for a, b in zip(row['errors'], timms['errors'], strict=True)) / IMAGES)
    assert ratio <= 1.1, f'{ratio:.2f} times as far off as timm, in the geometric mean over the images'
    assert row['agreement'] >= timms['agreement'] - 0.05
    assert row['lost'] > 2 * sum(row['errors']) / IMAGES, 'the check could not tell a model without attention'


def _words(label: str) -> str:
    name, reparameterized = MODELS[label]
    return f'{name}, reparameterized' if reparameterized else name


def _result(row: dict) -> str:
    if 'failure' in row:
        return f'fails: {row["failure"]}'
    if 'error' not in row:
        return 'converts'
    text = f'logits differ by {100 * row["error"]:.2g} %'
    if 'agreement' in row:
        text += f', {100 * row["agreement"]:.0f} % the same top class'
    return text + (f', file {100 * row["growth"]:+.1f} %' if 'growth' in row else '')
