"""What a row of the table of cases is made of: the case, its tensors, and the shapes that families share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 1234


@dataclass(frozen=True)
class Spec:
    """One tensor of a case: its shape, what its numbers mean, and whether it is differentiated."""

    shape: tuple[int, ...]
    kind: str = "normal"
    differentiable: bool = True


def draw(spec: Spec, dtype: torch.dtype) -> Tensor:
    shape = spec.shape
    if spec.kind == "labels":
        return torch.randint(0, 3, shape)
    values = {
        "normal": lambda: torch.randn(shape, dtype=torch.float64),
        "log_w": lambda: 3 * torch.randn(shape, dtype=torch.float64) - 1,
        # not centred: a mean of logits that cancels to 0 has no relative accuracy to speak of
        "logits": lambda: 2 * torch.randn(shape, dtype=torch.float64) + 0.7,
        "std": lambda: torch.rand(shape, dtype=torch.float64) + 0.3,
        "counts": lambda: torch.randint(0, 6, shape),
        "binary": lambda: torch.rand(shape).round(),
        "pixels": lambda: torch.randint(0, 256, shape) / 127.5 - 1,
        "unit": lambda: torch.rand(shape, dtype=torch.float64),
        "weights": lambda: torch.rand(shape, dtype=torch.float64) + 0.1,
        "mask": lambda: torch.rand(shape).add(0.2).round(),
    }[spec.kind]()
    return values.to(dtype)


@dataclass(frozen=True)
class Case:
    """`call` the public function, `oracle` the same from an independent formula; both take the tensors of `specs`."""

    name: str
    call: Callable[..., Any]
    specs: Callable[[int, int], Sequence[Spec]]
    oracle: Callable[..., Any]
    differentiable: bool = True
    # the derivative is that of the value: not so where weights are detached
    derivative: bool = True
    random: bool = False
    # what n = 0 gives: True a result, False an error
    empty_event: bool = True
    # all sizes of the grid, or (where only the shape's structure is new) a few
    every_size: bool = True
    # a composition of PyTorch ops or of several kernels: nothing is said about what it saves
    composed: bool = False
    # a differentiated input is broadcast: PyTorch sums its gradient, out of numbers already rounded to its dtype
    broadcast: bool = False
    # gradients are made along with the value, and kept
    made: bool = False
    # the layout in which all classes are alike: the KL of two uniform distributions, and its gradient, are rounding
    degenerate: str = ""

    @property
    def function(self) -> str:
        return self.name.partition("[")[0]

    def __call__(self, *tensors: Tensor) -> Any:
        """The call; a random one with the same noise each time."""
        if self.random:
            torch.manual_seed(SEED)
        return self.call(*tensors)

    def expected(self, *tensors: Tensor) -> Any:
        if self.random:
            torch.manual_seed(SEED)
        return self.oracle(*tensors)

    def __repr__(self) -> str:
        return self.name


# ---- shapes ----------------------------------------------------------------------------------------------------------


def last(kind: str = "normal", *, count: int = 1) -> Callable[[int, int], list[Spec]]:
    """`count` tensors [rows, n]."""
    return lambda rows, n: [Spec((rows, n), kind)] * count


def first(kind: str = "normal") -> Callable[[int, int], list[Spec]]:
    """One tensor [n, rows]: the reduced axis is the first."""
    return lambda rows, n: [Spec((n, rows), kind)]


def gaussian(
    spread: str = "normal", *, prior: bool = False, shape: Callable[..., Any] = lambda rows, n: (rows, n)
) -> Any:
    """mean and spread, once or twice."""
    return lambda rows, n: [Spec(shape(rows, n)), Spec(shape(rows, n), spread)] * (2 if prior else 1)


def block(rows: int, n: int) -> tuple[int, ...]:
    """[rows, C, H, W] with about n elements of event."""
    return rows, 2, (n + 5) // 6, 3


def video(rows: int, n: int) -> tuple[int, ...]:
    """[rows, C, T, H, W]."""
    return rows, 3, 2, (n + 11) // 12, 2


# ---- oracles ---------------------------------------------------------------------------------------------------------


def reduced(rows: Tensor, reduction: str) -> Tensor:
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](rows)


def softplus(x: Tensor) -> Tensor:
    """log(e^0 + e^x): neither F.softplus, which turns linear, nor the references' logsigmoid."""
    return torch.logaddexp(x, torch.zeros_like(x))


def bce(logits: Tensor, x: Tensor, event_ndims: int = 1) -> Tensor:
    logits, x = torch.broadcast_tensors(logits, x)
    terms = -F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return terms.sum(dim=tuple(range(-event_ndims, 0))) if event_ndims else terms


# ---- noise -----------------------------------------------------------------------------------------------------------


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. (2011), Sec. 3.3: counters `[n, 4]` of 32-bit words, a key of two."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k = list(key)
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high0, low0 = product0 >> np.uint64(32), product0 & mask
        high1, low1 = product1 >> np.uint64(32), product1 & mask
        c = [high1 ^ c[1] ^ np.uint64(k[0]), low1, high0 ^ c[3] ^ np.uint64(k[1]), low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, axis=-1)


def noise(rng_state: Tensor, shape: Sequence[int]) -> Tensor:
    """The standard normals of (seed, offset) in float64: counter (block, offset), key seed, Box-Muller on 24 bits."""
    seed, offset = (int(v) % 2**64 for v in rng_state.tolist())
    count = math.prod(shape)
    block = np.arange((count + 3) // 4, dtype=np.uint64)
    high = np.full_like(block, offset >> 32)
    counter = np.stack([block % 2**32, block >> np.uint64(32), np.full_like(block, offset % 2**32), high], axis=-1)
    uniform = (philox4x32(counter, (seed % 2**32, seed >> 32)) >> np.uint64(8)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((uniform[:, 0::2] + 1) / 2**24))
    angle = 2 * np.pi * uniform[:, 1::2] / 2**24
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return torch.from_numpy(normal.reshape(-1)[:count].reshape(tuple(shape)))


def draw_rng_state(device: torch.device) -> Tensor:
    """What a sampling function takes from PyTorch's generator."""
    return torch.randint(2**63 - 1, (2,), device=device)
