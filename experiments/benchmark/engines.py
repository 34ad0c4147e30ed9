"""What runs a model that was exported for it, on a CPU. docs/export.md says how to export."""

import tempfile
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_senetv2.errors import UserError

Run = Callable[[Tensor], Tensor]
ENGINES: dict[str, tuple[str, ...]] = {  # and the modules that they need
    'torchscript': (),
    'aot-inductor': (),
    'onnxruntime': ('onnx', 'onnxscript', 'onnxruntime'),
    'openvino': ('onnx', 'onnxscript', 'openvino'),
    'executorch': ('executorch',),
}


def require_engine(name: str) -> None:
    """Raise a UserError that says how to install the first module that an engine lacks."""
    for module in ENGINES[name]:
        try:
            __import__(module)
        except ImportError:
            raise UserError(f'{module} is not installed; pip install {module}, or leave out {name}') from None


def engine(name: str, model: nn.Module, x: Tensor) -> Run:
    """Export a model in eval mode for inputs of the shape of `x`, and load it with torch's number of threads.

    Raises:
        UserError: The engine is not installed.
    """
    require_engine(name)
    folder = tempfile.TemporaryDirectory(prefix='benchmark-engine-')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # exporters warn of their own future
        run = _LOADERS[name](model, x, Path(folder.name))
    weakref.finalize(run, folder.cleanup)
    return run


def _torchscript(model: nn.Module, x: Tensor, folder: Path) -> Run:
    torch.jit.script(model).save(folder / 'model.pt')
    loaded = torch.jit.load(folder / 'model.pt')
    return torch.inference_mode()(lambda x: loaded(x))


def _aot_inductor(model: nn.Module, x: Tensor, folder: Path) -> Run:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    with torch.no_grad():
        package = aoti_compile_and_package(torch.export.export(model, (x,)), package_path=str(folder / 'model.pt2'))
    loaded = aoti_load_package(package)
    return torch.inference_mode()(lambda x: loaded(x))


def _onnx(model: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / 'model.onnx'
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path


def _onnxruntime(model: nn.Module, x: Tensor, folder: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait for the next call at full speed would take the cores from the next contestant
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(_onnx(model, x, folder), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(model: nn.Module, x: Tensor, folder: Path) -> Run:
    import openvino

    # Its default takes bfloat16 where the processor has it
    config = {
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
        'INFERENCE_PRECISION_HINT': 'f32',
        'PERFORMANCE_HINT': 'LATENCY',
    }
    request = openvino.Core().compile_model(_onnx(model, x, folder), 'CPU', config).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])


def _executorch(model: nn.Module, x: Tensor, folder: Path) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    with torch.no_grad():
        lowered = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    path = folder / 'model.pte'
    path.write_bytes(lowered.to_executorch().buffer)
    if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():
        portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
    method = Runtime.get().load_program(path).load_method('forward')
    return lambda x: method.execute([x])[0]


_LOADERS: dict[str, Callable[[nn.Module, Tensor, Path], Run]] = {
    'torchscript': _torchscript,
    'aot-inductor': _aot_inductor,
    'onnxruntime': _onnxruntime,
    'openvino': _openvino,
    'executorch': _executorch,
}
