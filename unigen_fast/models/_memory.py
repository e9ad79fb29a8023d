"""How much passes the networks at a time, so that a bound of many samples fits into memory."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MAX_BYTES = 2**25  # convolutions take as much again inside

_FIRST_ROWS = 2  # one alone is refused by batch normalisation
_GROWTH = 8
_COMPILED = 16  # bytes that a row is taken to need for each of an example, where nothing can be measured
T = TypeVar("T")


class Chunks:
    """How many rows a computation takes at a time within `max_bytes`: its first, small chunks are measured.

    What a chunk needs grows at most in proportion to its rows: the next may have as many as would then just fit, up to
    eight times as many.
    """

    def __init__(self, max_bytes: int, model: nn.Module, examples: Sequence[Tensor]) -> None:
        self.max_bytes, self.rows = max_bytes, _FIRST_ROWS
        self._known = torch.compiler.is_compiling()
        if self._known:
            self.rows = max(1, max_bytes // max(1, _COMPILED * examples[0][:1].nbytes))
        else:
            self._there = {_address(t) for t in (*model.parameters(), *model.buffers(), *examples)}

    def run(self, rows: int, compute: Callable[..., T], *inputs: Any) -> T:
        """`compute(*inputs)` of that many rows. Compiled networks run as they were written while they are measured."""
        if self._known:
            return compute(*inputs)
        with torch.compiler.set_stance("force_eager"), _PeakBytes(self._there) as memory:
            found = compute(*inputs)
        fitting = rows * self.max_bytes // max(1, memory.peak)
        self.rows = max(1, min(fitting, _GROWTH * rows))
        self._known = 2 * memory.peak > self.max_bytes
        return found


def blocks(examples: Sequence[Tensor], *chunks: Chunks) -> Iterator[list[Tensor]]:
    """The examples, as many at a time as all of the chunks allow; at least one block, be it empty."""
    start, n = 0, len(examples[0])
    while start == 0 or start < n:
        size = min(c.rows for c in chunks)
        yield [t[start : start + size] for t in examples]
        start += size


class _PeakBytes(TorchFunctionMode):
    """The most bytes of tensors that PyTorch's functions took and gave at a time, beside those that were there."""

    def __init__(self, there: Iterable[int]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = set(there)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in (*args, *(found if isinstance(found, (tuple, list)) else (found,))):
            if type(t) is Tensor and _address(t) not in self._known:
                self._note(t.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self._known.add(address)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
