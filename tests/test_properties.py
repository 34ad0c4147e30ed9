"""Properties of the layers' and the models' arguments, whatever they are: a right result or one plain line."""

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_senetv2 import ChannelAggregation, SqueezeAggregatedExcitation
from timm_senetv2.create import check_options
from timm_senetv2.errors import UserError

some = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-3, 300), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
sizes = st.one_of(st.integers(-2, 70), odd)


def is_size(value: object) -> bool:
    return type(value) is int and value > 0


def assert_names(error: Exception, *names: str) -> None:
    """One plain line that names one of the arguments."""
    assert str(error).isprintable() and any(name in str(error) for name in names), error


@some
@given(
    sizes,
    st.fixed_dictionaries(
        {},
        optional=dict(
            reduction=sizes,
            cardinality=sizes,
            rd_channels=st.one_of(st.none(), sizes),
            gate_layer=st.one_of(st.sampled_from(['sigmoid', 'hard_sigmoid', 'tanh', torch.nn.Softplus]), odd),
            act_layer=st.one_of(st.sampled_from([torch.nn.ReLU, torch.nn.SiLU]), odd),
            bias=st.one_of(st.booleans(), odd),
            add_identity=st.one_of(st.booleans(), odd),
        ),
    ),
)
def test_sae_with_any_arguments_is_the_layer_asked_for_or_refused_by_name(channels, options):
    try:
        layer = SqueezeAggregatedExcitation(channels, **options)
    except ValueError as e:
        assert_names(e, 'channels', *options)
        return
    reduction, cardinality = options.get('reduction', 32), options.get('cardinality', 4)
    assert all(map(is_size, (channels, reduction, cardinality)))
    hidden = options.get('rd_channels') or max(1, channels // reduction)
    biases = options.get('bias', True)
    assert type(biases) is bool and type(options.get('add_identity', False)) is bool
    expected = 2 * channels * cardinality * hidden + biases * (channels + cardinality * hidden)
    assert sum(p.numel() for p in layer.parameters()) == expected
    x = torch.randn(2, channels, 3, 4)
    assert layer(x).shape == x.shape and layer(x).isfinite().all()


@some
@given(sizes, st.one_of(st.sampled_from(ChannelAggregation.OPS), odd), st.integers(0, 40))
def test_aggregation_with_any_arguments_is_that_of_numpy_or_refused_by_name(factor, op, channels):
    x = torch.randn(2, channels, 2, 3, dtype=torch.float64)
    try:
        out = ChannelAggregation(factor, op)(x)
    except ValueError as e:
        assert_names(e, 'factor', 'op')
        assert not is_size(factor) or op not in ChannelAggregation.OPS or channels % factor
        return
    groups = x.numpy().reshape(2, channels // factor, factor, 2, 3)
    expected = torch.from_numpy(getattr(groups, op)(axis=2))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


values = st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 40), odd)
SAE = dict(
    sae_reduction=values, sae_cardinality=values, sae_add_identity=st.booleans() | odd, sae_bias=st.booleans() | odd
)
EVERY = dict(
    num_classes=values, in_chans=values, drop_rate=values, global_pool=st.sampled_from(['avg', 'max', '']) | odd
)
WIDTHS = st.lists(st.integers(-1, 300), min_size=2, max_size=4) | values
CIFAR = dict(
    depth=st.sampled_from([8, 14, 20]) | values,
    widths=WIDTHS,
    stem_width=values,
    drop_path_rate=values,
    aggregation_factor=values,
    aggregation_op=st.sampled_from(['sum', 'mean', 'max']) | odd,
    aggregate_after=st.sampled_from(['stage', 'block']) | odd,
)
TIMMS = dict(stem_width=values, base_width=values, cardinality=values, drop_path_rate=values, output_stride=values)
MODELS = {
    'cifar_senetv2_resnet20': {**SAE, **EVERY, **CIFAR},
    'seanet20': {**SAE, **EVERY, **CIFAR},
    'small_saecnn': {**SAE, **EVERY, 'widths': WIDTHS},
    'small_cnn': {**SAE, **EVERY},
    'senetv2_resnet18': {**SAE, **EVERY, **TIMMS},
}


@pytest.mark.parametrize('name', MODELS)
@some
@given(st.data())
def test_model_with_any_options_is_the_one_asked_for_or_refused_in_one_line(name, data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(MODELS[name])), max_size=3, unique=True))
    options = {key: data.draw(MODELS[name][key], label=key) for key in chosen}
    try:
        check_options(name, options)
    except UserError as e:
        assert str(e).isprintable() and len(str(e)) < 2000
        return
    model = timm.create_model(name, device='meta', **options)
    layers = [m for m in model.modules() if isinstance(m, SqueezeAggregatedExcitation)]
    for layer in layers:
        if 'sae_cardinality' in options:
            assert layer.cardinality == options['sae_cardinality']
        if 'sae_reduction' in options:
            assert layer.rd_channels == max(1, layer.channels // options['sae_reduction'])
        if 'sae_bias' in options:
            assert (layer.fc1.bias is not None) is options['sae_bias']
    if not layers:  # what attention alone has is refused without it
        assert not {key for key in options if key.startswith('sae_') and options[key] not in (None, 0)}
    if options.get('num_classes') is not None:
        assert model.num_classes == options['num_classes']
