"""Triton kernels: the GPU path wherever the CUDA extension is not built, on NVIDIA and AMD.

One module per family; the functions in its `__all__` are the implementations of the ops of those names in `_ops.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unigen_fast._fused import FusedOp
from unigen_fast.triton import adversarial, categorical, divergence, importance, likelihood, objectives, pairwise
from unigen_fast.triton._rows import Unsupported

OPS: dict[str, Callable[..., Any]] = {
    name: getattr(module, name)
    for module in (importance, adversarial, divergence, likelihood, categorical, pairwise, objectives)
    for name in module.__all__
}


def _contiguous(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.contiguous()
    return [_contiguous(item) for item in x] if isinstance(x, list) and x and isinstance(x[0], Tensor) else x


def _laid_out_as(grads: Any, like: tuple[Tensor | None, ...]) -> Any:
    if isinstance(grads, Tensor):
        return torch.empty_like(like[0]).copy_(grads)  # type: ignore[arg-type]
    pairs = zip(grads, like, strict=False)
    return type(grads)(g if t is None or g.shape != t.shape else torch.empty_like(t).copy_(g) for g, t in pairs)


def _any_strides(name: str, kernels: Callable[..., Any]) -> Callable[..., Any]:
    """The op, on contiguous copies where the operands have more dimensions than its kernels resolve."""
    op = next(op for op in FusedOp.every if op.name == name.removesuffix("_backward"))

    def differentiable(inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        return tuple(inputs[i] for i in op.differentiable)

    @functools.wraps(kernels)
    def call(*args: Any) -> Any:
        try:
            return kernels(*args)
        except Unsupported:
            result = kernels(*map(_contiguous, args))
        if not name.endswith("_backward"):
            if not op.gradients:
                return result
            made = len(result) - op.gradients
            return *result[:made], *_laid_out_as(result[made:], differentiable(args))
        inputs = args[op.differentiable_outputs :]  # behind the gradients of the outputs
        return _laid_out_as(result, inputs[0] if op.tensor_list else differentiable(inputs))

    return call


def register(library: torch.library.Library, key: str) -> None:
    """Makes the Triton kernels the ops' implementations under a dispatch key."""
    for name, op in OPS.items():
        library.impl(name, _any_strides(name, op), key)
