"""What the tests share: tensors in every layout, running on kernel and reference, and comparing."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases.base import Case, draw
from torch import Tensor

import unigen_fast as uf
from unigen_fast import _fused, _ops
from unigen_fast._fused import FusedOp

OPS: dict[str, FusedOp] = {name: op for name, op in vars(_ops).items() if isinstance(op, FusedOp)}
NATIVE = {backend.name: backend.loaded for backend in uf.info().backends}
LOW_PRECISION = (torch.bfloat16, torch.float16)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def contiguous(x: Tensor) -> Tensor:
    return x.clone()


def sliced(x: Tensor) -> Tensor:
    """A window of a larger tensor: rows neither adjacent nor aligned, NaN all around."""
    large = torch.full([n + 3 for n in x.shape], math.nan, dtype=torch.float64).to(x.dtype)
    window = large[tuple(slice(1, n + 1) for n in x.shape)]
    return window.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The first dimension is the fastest."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def stepped(x: Tensor) -> Tensor:
    """Every other element of a larger tensor along the last dimension."""
    large = torch.full((*x.shape[:-1], 2 * x.size(-1)), math.nan, dtype=torch.float64).to(x.dtype)
    return large[..., ::2].copy_(x)


def expanded_rows(x: Tensor) -> Tensor:
    return x[:1].clone().expand_as(x)


def expanded_last(x: Tensor) -> Tensor:
    return x[..., :1].clone().expand_as(x)


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else transposed(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (sliced, contiguous, transposed, stepped, expanded_rows, expanded_last, channels_last)
}
# the tensors of one call laid out differently: a kernel that takes one tensor's strides for all goes wrong
MIXED = (sliced, transposed, expanded_rows, stepped, contiguous)


def seed_generators(seed: int) -> None:
    """`torch.manual_seed`; that takes 2 ms without a GPU: it notes a stack for each kind of device that is absent."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def make(
    case: Case,
    rows: int,
    n: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    layout: str = "sliced",
    seed: int = 0,
) -> list[Tensor]:
    """The tensors of `case`, `n` along the reduced axis, those differentiated being leaves."""
    seed_generators(seed)
    tensors = []
    for i, spec in enumerate(case.specs(rows, n)):
        x = draw(spec, dtype)
        if x.dim() and x.is_floating_point():
            x = (MIXED[i % len(MIXED)] if layout == "mixed" else LAYOUTS[layout])(x)
        if device.type != "cpu" if isinstance(device, torch.device) else device != "cpu":
            x = _to_device(x, device)
        tensors.append(x.detach().requires_grad_(spec.differentiable and x.is_floating_point()))
    return tensors


def _to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`Tensor.to` would make it dense; the strides are what the test is about."""
    storage = torch.empty(0, dtype=x.dtype, device=device)
    storage.set_(x.untyped_storage().to(device=device), x.storage_offset(), x.shape, x.stride())
    return storage


def upcast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in float64, as new leaves."""
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.requires_grad]


def numbers(tree: Any) -> Iterator[float]:
    """All of a JSON record's numbers."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from numbers(branch)
    elif isinstance(tree, int | float):
        yield tree


# ---- running ---------------------------------------------------------------------------------------------------------


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """All tensors of a result: of tuples in tuples and of lists too."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(tensor for output in outputs for tensor in as_tuple(output))


def cotangents_like(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor | None]:
    """Random, so that no error cancels, and away from 0; None for outputs that carry no gradient."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor | None] = []
    for o in outputs:
        values = 0.5 + torch.rand(o.shape, dtype=torch.float64, generator=generator)
        signs = torch.randint(0, 2, o.shape, generator=generator) * 2 - 1
        found.append((values * signs).to(o.dtype).to(o.device) if o.requires_grad else None)
    return found


def pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], **options: Any
) -> list[Tensor]:
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
    if not pairs:
        return []
    grads = torch.autograd.grad([o for o, _ in pairs], list(inputs), [c for _, c in pairs], **options)
    return list(grads)


def value_and_gradients(call: Callable[..., Any], tensors: Sequence[Tensor], cotangents: Any = None) -> Any:
    outputs = as_tuple(call(*tensors))
    cotangents = cotangents_like(outputs) if cotangents is None else cotangents
    return outputs, pull_back(outputs, leaves(tensors), cotangents), cotangents


@contextmanager
def reference_path() -> Iterator[None]:
    """The public functions on their plain PyTorch references, differentiated by PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused, "transformed", lambda *tensors: True)
        for op in FusedOp.every:
            patch.setattr(op, "native", None)
        yield


@contextmanager
def without_kernels() -> Iterator[None]:
    """The public functions as they are where no kernel is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedOp, "devices", set())
        for op in FusedOp.every:
            patch.setattr(op, "native", None)
        yield


@contextmanager
def recorded_ops() -> Iterator[list[tuple[str, Any, tuple[Any, ...]]]]:
    """Every forward and backward op that runs, as (name, overload, arguments). Without kernels their references do."""
    calls: list[tuple[str, Any, tuple[Any, ...]]] = []

    def recorder(overload: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append((overload._schema.name.partition("::")[2], overload, args))
            return overload(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedOp, "devices", {"cpu", "cuda"})
        for op in OPS.values():
            patch.setattr(op, "native", None)  # it finds the ops without Python
            patch.setattr(op, "forward", recorder(op.forward))
            if hasattr(op, "backward"):
                patch.setattr(op, "backward", recorder(op.backward))
        yield calls


def assert_refused(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    """Refused with a message that says what was wrong, before any op ran."""
    with recorded_ops() as calls, pytest.raises(error, match=match):
        call()
    assert calls == []


# ---- comparing -------------------------------------------------------------------------------------------------------


def assert_close(got: Tensor, expected: Tensor, relative: float, absolute: float = 0.0, *, what: str = "") -> None:
    """|got - expected| <= relative · max(|expected|, its root mean square) + absolute, elementwise.

    The root mean square is the scale of the result: an element that cancels to almost 0 is held to its neighbours'
    rounding. NaN and infinities must be where they are expected.
    """
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    strange = ~finite & ~((got == expected) | (got.isnan() & expected.isnan()))
    assert not strange.any(), f"{what}: {got[strange][:5]} where {expected[strange][:5]} was expected"
    got, expected = got[finite], expected[finite]
    if expected.numel() == 0:
        return
    allowed = relative * torch.maximum(expected.abs(), expected.square().mean().sqrt()) + absolute
    error = (got - expected).abs()
    wrong = ~(error <= allowed)  # a NaN in `got` is wrong
    if wrong.any():
        worst = torch.where(error.isnan(), math.inf, error / allowed).argmax()
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong; worst got {got[worst]}, expected {expected[worst]}, "
            f"{float(error[worst] / allowed[worst]):.3g} times the allowed error"
        )


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert same.all(), f"{what}: {got[~same][:5]} is not {expected[~same][:5]}"


def assert_rounded_alike(got: Tensor, expected: Tensor, what: str = "") -> None:
    """The same bits where there are kernels. Without, two ways to one number are PyTorch's operations in another order,
    and what is no number takes its call to the reference."""
    if NATIVE[got.device.type]:
        assert_same_bits(got, expected, what)
    else:
        assert got.dtype == expected.dtype, what
        info = torch.finfo(got.dtype)
        assert_close(got, expected, 8 * info.eps, info.tiny, what=what)


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) of a tensor of `dtype` against float64. Low precision: one rounding, subnormals included."""
    if dtype in LOW_PRECISION:
        info = torch.finfo(dtype)
        return info.eps, info.smallest_normal * info.eps
    return {torch.float64: 1e-10, torch.float32: 1e-5}[dtype], 1e-30
