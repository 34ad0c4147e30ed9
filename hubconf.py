"""For torch.hub: every model of this package, under its name.

    torch.hub.load('.', 'senetv2_resnet50', source='local', num_classes=10)    in a checkout
    torch.hub.load('OWNER/NAME', 'senetv2_resnet50', pretrained=True)          of a repository on GitHub
    torch.hub.list('OWNER/NAME'), torch.hub.help('OWNER/NAME', 'seanet20')

The arguments are those of `timm.create_model` and of the model. `senetv2_resnet50.se_a1_in1k` and other tags are for
`timm.create_model`; here they are an argument: `pretrained_cfg='se_a1_in1k', pretrained=True`.
"""

from typing import Any as _Any  # what has no underscore is a model

dependencies = ['timm', 'torch', 'torchvision', 'filelock', 'huggingface_hub', 'safetensors']


def _entry_points() -> dict[str, _Any]:
    from collections.abc import Callable
    from functools import update_wrapper

    import timm

    from timm_senetv2 import catalog

    def entry(name: str) -> Callable[..., _Any]:
        def create(pretrained: bool = False, **kwargs: _Any) -> _Any:
            return timm.create_model(name, pretrained=pretrained, **kwargs)

        return update_wrapper(create, timm.model_entrypoint(name))

    return {name: entry(name) for name in catalog.names()}


globals().update(_entry_points())
