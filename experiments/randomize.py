"""Random weights under which every part of a model matters to its output."""

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module, images: torch.Tensor, scales: tuple[float, float] = (0.5, 1.5)) -> nn.Module:
    """Give every norm, bias and scale random values, and every batch norm statistics measured on images.

    A fresh model will not do for comparing two of them: many zero the last norm of a residual branch, which hides all
    that the branch computes, and batch norm's fresh statistics change nothing.

    Args:
        model: Changed in place and set to eval mode. Weights of convolutions and linear layers stay as they are.
        images: (N, C, H, W), two or more.
        scales: Range of the norms' weights. The deeper the model, the more large ones amplify rounding errors.

    Returns:
        The model.
    """
    for name, parameter in model.named_parameters():
        if name.endswith('bias'):
            parameter.normal_(std=0.2)
        elif parameter.ndim < 2:
            parameter.uniform_(*scales)
    norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in norms.items():
        norm.momentum = momentum
    return model.eval()
