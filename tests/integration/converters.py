"""One converter, three models, in a process without an import of ours: `python converters.py NAME FOLDER`.

The models are senetv2_resnet50, the same after timm.models.reparameterize_model, and timm's seresnet50 for comparison,
with random norms and gates. Prints one JSON line for each model: `error`, the relative distance of the converted
model's logits from the original's in float64, the `bound` that it must keep, how far the logits are off where the
attention is `lost`, and what the converter adds; or `failure`.

In a paired check all three models compute the same function, with smaller residual branches, as after a training: how
far the rounding to 8 bits leads is as much a matter of the weights as of the converter. `errors` has the distance of
each of many images, so that ours can be compared with timm's pair by pair, and `agreement` is the share of images with
the same top class.
"""

import copy
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, CLASSES, IMAGES = 64, 10, 64
MODELS = {
    'ours': ('senetv2_resnet50', False),
    'reparameterized': ('senetv2_resnet50', True),
    'timm': ('seresnet50', False),
}
Run = Callable[[Tensor], Tensor]


class Converter:
    """A converter by the name of its function: the library, how it is called, and what it does."""

    every: dict[str, 'Converter'] = {}

    def __init__(self, library: str, call: str, function: Callable, bits: int, runs: bool, paired: bool) -> None:
        self.library, self.call, self.function = library, call, function
        self.bits, self.runs, self.paired = bits, runs, paired


def converter(library: str, call: str, bits: int = 24, runs: bool = True, paired: bool = False) -> Callable:
    """Register `function(model, x, folder) -> run`.

    Args:
        library: Whose converter it is.
        call: How it is called.
        bits: The precision of its arithmetic.
        runs: Whether what it makes can be run here.
        paired: Whether the outcome is compared with that of timm's model, instead of with what rounding can do.
    """

    def register(function: Callable) -> Callable:
        Converter.every[function.__name__] = Converter(library, call, function, bits, runs, paired)
        return function

    return register


# --- Models ---


def build(name: str, residual: float = 1.0, gates: float = 8.0) -> nn.Module:
    """A model whose norms have the statistics of its data, random weights, and gates that depend on the image.

    Args:
        name: Of the model.
        residual: Size of the residual branches, beside the shortcuts.
        gates: Standard deviation of the gates' logits, in units of their input's.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    norms = {place: m for place, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for place, norm in norms.items():
        size = residual if place.endswith('bn3') else 1.0
        nn.init.uniform_(norm.weight, 0.5 * size, 1.5 * size)
        nn.init.normal_(norm.bias, std=0.5 * size)
        norm.momentum = None  # the plain average
    for module in model.modules():
        if hasattr(module, 'fc2'):
            nn.init.normal_(module.fc1.weight, std=module.fc1.weight[0].numel() ** -0.5)
            nn.init.normal_(module.fc2.weight, std=gates * module.fc2.weight[0].numel() ** -0.5)
    with torch.no_grad():
        model(inputs(32))
    for norm in norms.values():
        norm.momentum = 0.1
    return model.eval()


def same_function(name: str) -> nn.Module:
    """timm's model, or ours with its weights: each hidden unit of SE stands twice in SaE, with half the weight each."""
    source = build('seresnet50', residual=0.5)
    if name == 'seresnet50':
        return source
    model = timm.create_model(name, num_classes=CLASSES).eval()
    state = {
        k: v.flatten(1) if '.se.' in k and v.ndim == 4 else v  # dense layers in place of 1x1 convs
        for k, v in source.state_dict().items()
    }
    for k, v in state.items():
        if '.se.fc1.' in k:
            state[k] = torch.cat([v, v])
        elif '.se.fc2.weight' in k:
            state[k] = torch.cat([v, v], 1) / 2
    model.load_state_dict(state)
    with torch.no_grad():
        assert distance(model(inputs(4)), source(inputs(4))) < 1e-5
    return model


def inputs(batch: int) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))


def constant_gates(model: nn.Module) -> nn.Module:
    """A copy whose gates do not see the image: what a converter that lost the attention would compute."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, 'fc2'):
            nn.init.zeros_(module.fc2.weight)
    return model


def distance(a: Tensor, b: Tensor) -> float:
    """Of a from b, relative to b."""
    return float((a.double() - b).norm() / b.norm())


def rounding(model: nn.Module, bits: int) -> float:
    """How far rounding can take the output, relative to it.

    In floating point each layer adds the error of its sums: 2^-bits times the root of their length. Integers of 8 bits
    cover +-6 standard deviations in 255 steps, and rounding to steps of d has a standard deviation of d / sqrt(12):
    that is the error of a layer's weights relative to them, and of its input; the errors of all layers are independent.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if bits == 8:
        return 12 / 255 / math.sqrt(12) * math.sqrt(2 * len(weights))
    return 2.0**-bits * sum(math.sqrt(w[0].numel()) for w in weights)


# --- torch's own ---


@converter('torch', 'torch.export.export(strict=False)')
def export(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _exported(model, x, strict=False).module()


@converter('torch', 'torch.export.export(strict=True)')
def export_strict(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _exported(model, x, strict=True).module()


def _exported(model: nn.Module, x: Tensor, strict: bool = False, dynamic: bool = True) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim('batch', min=1, max=64)},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=batch, strict=strict)


@converter('torch', 'torch.jit.script')
def script(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _saved_script(torch.jit.script(model), folder)


@converter('torch', 'torch.jit.trace')
def trace(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _saved_script(torch.jit.trace(model, x), folder)


def _saved_script(module: torch.jit.ScriptModule, folder: Path) -> Run:
    torch.jit.save(module, folder / 'model.pt')
    return torch.jit.load(folder / 'model.pt')


@converter('torch', 'torch._inductor.aoti_compile_and_package')
def aot_inductor(model: nn.Module, x: Tensor, folder: Path) -> Run:
    path = str(folder / 'model.pt2')
    torch._inductor.aoti_compile_and_package(_exported(model, x), package_path=path)
    return torch._inductor.aoti_load_package(path)


@converter('torchao', 'quantize_(model, Int8DynamicActivationInt8WeightConfig())', bits=8)
def torchao_int8(model: nn.Module, x: Tensor, folder: Path) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    plain = {
        name for name, m in quantized.named_modules() if isinstance(m, nn.Linear) and type(m.weight.data) is Tensor
    }
    assert not plain, f'not quantized: {sorted(plain)}'
    return quantized


# --- ONNX ---


def _onnx(model: nn.Module, x: Tensor, folder: Path, dynamo: bool = True) -> Path:
    path = folder / 'model.onnx'
    options = (
        dict(dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},), external_data=False, verbose=False)
        if dynamo
        else dict(dynamic_axes={'x': {0: 'batch'}, 'logits': {0: 'batch'}})
    )
    torch.onnx.export(model, (x,), path, input_names=['x'], output_names=['logits'], dynamo=dynamo, **options)
    return path


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0])


@converter('onnx', 'torch.onnx.export(dynamo=True)')
def onnx_dynamo(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _onnxruntime(_onnx(model, x, folder))


@converter('onnx', 'torch.onnx.export(dynamo=False)')
def onnx_torchscript(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _onnxruntime(_onnx(model, x, folder, dynamo=False))


@converter('onnxslim', 'onnxslim.slim')
def onnxslim(model: nn.Module, x: Tensor, folder: Path) -> Run:
    import onnx
    import onnxslim

    path = _onnx(model, x, folder)
    slim = folder / 'slim.onnx'
    onnx.save(onnxslim.slim(str(path)), slim)
    run = _onnxruntime(slim)
    run.facts = dict(growth=slim.stat().st_size / path.stat().st_size - 1)
    return run


@converter('onnxruntime', 'quant_pre_process, then quantize_dynamic', paired=True)
def onnxruntime_dynamic(model: nn.Module, x: Tensor, folder: Path) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / 'quantized.onnx'
    quantize_dynamic(_preprocessed(model, x, folder), path, weight_type=QuantType.QUInt8)  # its kernels take no QInt8
    return _quantized(path)


@converter('onnxruntime', 'quant_pre_process, then quantize_static', paired=True)
def onnxruntime_static(model: nn.Module, x: Tensor, folder: Path) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter({'x': inputs(n).numpy()} for n in range(8, 12))

        def get_next(self):
            return next(self.batches, None)

    path = folder / 'quantized.onnx'
    quantize_static(_preprocessed(model, x, folder), path, Reader(), per_channel=True)
    return _quantized(path)


def _preprocessed(model: nn.Module, x: Tensor, folder: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / 'preprocessed.onnx'
    quant_pre_process(_onnx(model, x, folder), path)
    return path


def _quantized(path: Path) -> Run:
    import onnx

    kinds = {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) > 1}
    assert kinds <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}, f'weights left as they were: {kinds}'
    return _onnxruntime(path)


# --- Other runtimes ---


@converter('openvino', 'convert_model(model, example_input=x)')
def openvino(model: nn.Module, x: Tensor, folder: Path) -> Run:
    import openvino

    return _openvino(openvino.convert_model(model, example_input=x, input=[(-1, 3, SIZE, SIZE)]))


@converter('openvino', 'convert_model(exported program)')
def openvino_export(model: nn.Module, x: Tensor, folder: Path) -> Run:
    import openvino

    return _openvino(openvino.convert_model(_exported(model, x)))


@converter('openvino', "convert_model('model.onnx')")
def openvino_onnx(model: nn.Module, x: Tensor, folder: Path) -> Run:
    import openvino

    return _openvino(openvino.convert_model(_onnx(model, x, folder)))


def _openvino(converted: object) -> Run:
    import openvino

    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


@converter('coremltools', 'convert(traced), its MIL program computed by torch')
def coreml_trace(model: nn.Module, x: Tensor, folder: Path) -> Run:
    import coremltools

    traced = torch.jit.trace(model, x)
    return _coreml(traced, folder, inputs=[coremltools.TensorType(name='x', shape=tuple(x.shape))])


@converter('coremltools', 'convert(exported program), not run', runs=False)
def coreml_export(model: nn.Module, x: Tensor, folder: Path) -> None:
    import coremltools

    program = _exported(model, x, dynamic=False).run_decompositions({})
    coremltools.convert(program, skip_model_load=True).save(str(folder / 'model.mlpackage'))


def _coreml(model: object, folder: Path, **kwargs: object) -> Run:
    """Core ML runs its models on macOS alone; what the converter made is computed here, operation by operation."""
    import coremltools

    converted = coremltools.convert(
        model,
        convert_to='mlprogram',
        compute_precision=coremltools.precision.FLOAT32,
        skip_model_load=True,
        **kwargs,
    )
    converted.save(str(folder / 'model.mlpackage'))
    main = converted._mil_program.functions['main']

    def run(x: Tensor) -> Tensor:
        (name,) = main.inputs
        values = {name: x}

        def value(given: object) -> object:
            if isinstance(given, (list, tuple)):
                return [value(v) for v in given]
            return values[given.name] if given.name in values else _constant(given.val)

        for op in main.operations:
            if op.op_type != 'const':
                found = {k: value(v) for k, v in op.inputs.items() if v is not None}
                values[op.outputs[0].name] = MIL[op.op_type](**found)
        return values[main.outputs[0].name]

    run.facts = dict(operations=sorted({op.op_type for op in main.operations} - {'const'}))
    return run


def _constant(value: object) -> object:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype == np.float32 else value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _pooled(x: Tensor, kernel_sizes: list, strides: list, pad_type: str, pad: list, ceil_mode: bool = False) -> Tensor:
    assert pad_type == 'custom' and not ceil_mode
    return F.max_pool2d(F.pad(x, _padding(pad), value=-math.inf), kernel_sizes, strides)


def _conv(
    x: Tensor,
    weight: Tensor,
    strides: list,
    pad_type: str,
    pad: list,
    dilations: list,
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    assert pad_type in ('custom', 'valid')
    x = F.pad(x, _padding(pad)) if pad_type == 'custom' else x
    return F.conv2d(x, weight, bias, strides, 0, dilations, groups)


def _padding(pad: list) -> list:  # MIL: height, then width; torch: from the last dimension on
    return [*pad[2:], *pad[:2]]


MIL: dict[str, Callable] = {  # the operations of these models; coremltools folds the norms
    'add': lambda x, y: x + y,
    'conv': _conv,
    'expand_dims': lambda x, axes: x.reshape(*x.shape, *[1] * len(axes)),
    'linear': F.linear,
    'max_pool': _pooled,
    'mul': lambda x, y: x * y,
    'reduce_mean': lambda x, axes, keep_dims: x.mean(axes, keep_dims),
    'relu': lambda x: F.relu(x),
    'reshape': lambda x, shape: x.reshape(shape),
    'sigmoid': lambda x: x.sigmoid(),
}


@converter('executorch', 'to_edge_transform_and_lower(partitioner=[XnnpackPartitioner()])')
def executorch_xnnpack(model: nn.Module, x: Tensor, folder: Path) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(_exported(model, x, dynamic=False), partitioner=[XnnpackPartitioner()])
    path = folder / 'model.pte'
    path.write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method('forward')

    def run(x: Tensor) -> Tensor:
        return method.execute([x])[0]

    calls = [node.name for node in lowered.exported_program().graph.nodes if node.op == 'call_function']
    run.facts = dict(parts=sum(name.startswith('executorch_call_delegate') for name in calls))
    return run


# --- Judgement ---


def check(one: Converter, name: str, reparameterize: bool, folder: Path) -> dict[str, object]:
    model = same_function(name) if one.paired else build(name)
    if reparameterize:
        model = timm.models.reparameterize_model(model)
    x, other = inputs(2), inputs(IMAGES if one.paired else 3)
    reference = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = [reference(t.double()) for t in (x, other)]
        lost = distance(constant_gates(reference)(x.double()), expected[0])
        run = one.function(model, x, folder)
        if not one.runs:
            return {}
        found = [run(x)]
        if one.library not in ('executorch', 'coremltools'):  # converted for one batch size
            found.append(run(other))
    error = max(itertools.starmap(distance, zip(found, expected, strict=False)))
    facts = dict(error=error, lost=lost, **getattr(run, 'facts', {}))
    if not one.paired:
        return facts | dict(bound=rounding(model, one.bits))
    pairs = list(zip(found[1], expected[1], strict=True))
    same = sum(int(a.argmax() == b.argmax()) for a, b in pairs)
    return facts | dict(errors=[distance(a, b) for a, b in pairs], agreement=same / len(pairs))


def main(name: str, folder: Path) -> None:
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    one = Converter.every[name]
    for label, (model, reparameterize) in MODELS.items():
        own = folder / label
        own.mkdir()
        try:
            found = check(one, model, reparameterize, own)
        except Exception as e:  # any failure is a result
            lines = [line for line in str(e).splitlines() if line.strip()] or ['']
            found = dict(failure=f'{type(e).__name__}: {lines[0]}'[:300])
            if 'TRACE' in os.environ:
                raise
        print('RESULT', json.dumps(dict(model=label, version=version(one.library), **found)), flush=True)


if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]))
