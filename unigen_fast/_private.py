"""The private names of torch that the package uses, each with a public way round it.

They are here for speed, and because PyTorch has no public question of that kind. A release of torch that drops or
renames one costs time, not the import: what takes its place is slower, or looks at each tensor.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

T = TypeVar("T")


def _found(*path: str) -> Any:
    """torch.path[0].path[1]…, or None."""
    at: Any = torch
    for name in path:
        at = getattr(at, name, None)
    return at


# A context in which an op's call skips the Python formula that it carries for autograd: half of a small call. Without
# it that formula is entered, and finds that there is nothing to record.
below_autograd: Callable[[], contextlib.AbstractContextManager[Any]] = (
    _found("_C", "_AutoDispatchBelowAutograd") or torch.no_grad
)

# Whether the backward pass at hand keeps its graph (retain_graph=True), or there is none: what was saved is then to
# stay as it is. Without this function it always stays.
graph_is_kept: Callable[[], bool] = _found("_C", "_autograd", "_get_current_graph_task_keep_graph") or (lambda: True)

_hooks = _found("_C", "_autograd", "_top_saved_tensors_default_hooks")


def saved_tensors_are_packed() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` are in force, whose owner may hold what a graph saves."""
    return _hooks is None or _hooks(True) is not None


_active = _found("_C", "_are_functorch_transforms_active")


def transforms_active(*tensors: Tensor | None) -> bool:
    """Whether `torch.func` is at work, on these tensors at least."""
    if _active is not None:
        return _active()
    return not torch.compiler.is_compiling() and any(t is not None and not _has_memory(t) for t in tensors)


def _has_memory(tensor: Tensor) -> bool:
    """Not so for what `torch.func` wraps, nor for sparse tensors."""
    try:
        tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return False
    return True


_has_level = hasattr(forward_ad, "_current_level")


def forward_mode(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD is at work, on these tensors at least."""
    if _has_level:
        return forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        return False
    try:
        return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    except RuntimeError:  # no level is open
        return False


def transformed(*tensors: Tensor | None) -> bool:
    """Whether `torch.func` or forward-mode AD is at work, on these tensors at least."""
    if _active is not None and _has_level:  # each call of a function counts here
        return _active() or forward_ad._current_level >= 0
    return transforms_active(*tensors) or forward_mode(*tensors)


_guard = _found("_C", "_ForceDispatchKeyGuard")
_included, _excluded = _found("_C", "_dispatch_tls_local_include_set"), _found("_C", "_dispatch_tls_local_exclude_set")
_keys, _key = _found("_C", "DispatchKeySet"), _found("_C", "DispatchKey", "AutogradCPU")


def with_autograd(function: Callable[[], T]) -> T:
    """The function's result with autograd at work, even in a kernel that the dispatcher runs below autograd."""

    def run() -> T:
        with torch.enable_grad():
            return function()

    if None in (_guard, _included, _excluded, _keys, _key):
        with ThreadPoolExecutor(1) as fresh:  # in a thread of its own the dispatcher excludes nothing
            return fresh.submit(run).result()
    # its functionality bit serves every backend
    with _guard(_included(), _excluded() - _keys(_key)):
        return run()


def known_true(condition: Any) -> bool:
    """Whether a condition on sizes or numbers holds for every value that a graph in the making may see."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    try:  # slow to import; the compiler has it
        from torch.fx.experimental.symbolic_shapes import statically_known_true
    except ImportError:
        return False
    return statically_known_true(condition)
