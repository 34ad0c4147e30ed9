"""What only a program that torch runs step by step gains from."""

import torch
from torch.autograd import forward_ad


def is_eager(x: torch.Tensor) -> bool:
    """Whether x is a tensor at hand. A trace, an export or a compilation plans memory and passes itself."""
    return not (isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing())


def has_tangent(*tensors: torch.Tensor) -> bool:
    """Whether a forward-mode derivative is on its way through one of the tensors."""
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def scale_gradients(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `x * scale`: grad · scale, (N, C, H, W), and the sums of grad · x over the pixels, (N, C).

    scale is (N, C). The first takes the memory of a product that the second needs: on a CPU new memory costs as much as
    the arithmetic.
    """
    product = grad * x
    sums = product.sum((2, 3))
    scale = scale[..., None, None]
    if not torch.is_grad_enabled():
        try:
            return torch.mul(grad, scale, out=product), sums
        except RuntimeError:  # vmap has no rule for `out` and leaves the product alone
            pass
    return grad * scale, sums
