"""Whatever converts timm's seresnet50 converts senetv2_resnet50, also reparameterized, with equal logits."""

import pytest
from converters import MODELS, Converter
from integrations import fresh, need, record

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
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
        if one.runs:
            bound = row['bound']
            if one.bits == 8:  # these models have wider ranges than six standard deviations, timm's too
                bound = max(bound, 1.25 * found['timm']['error'])
            assert row['lost'] > bound, 'the check could not tell a model without attention'
            assert row['error'] <= bound, label
        if 'growth' in row:  # of the file, by slimming it
            assert row['growth'] <= max(0, found['timm']['growth']) + 0.001
        if 'operations' in row:  # SE's layers are 1x1 convs, and SaE's are linear
            assert set(row['operations']) - set(found['timm']['operations']) <= {'linear', 'expand_dims', 'reshape'}


def _words(label: str) -> str:
    name, reparameterized = MODELS[label]
    return f'{name}, reparameterized' if reparameterized else name


def _result(row: dict) -> str:
    if 'failure' in row:
        return f'fails: {row["failure"]}'
    if 'error' not in row:
        return 'converts'
    text = f'logits differ by {100 * row["error"]:.2g} %'
    return text + (f', file {100 * row["growth"]:+.1f} %' if 'growth' in row else '')
