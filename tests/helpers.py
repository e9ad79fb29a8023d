"""One table of cases, and what the generic tests do with it.

A `Case` is a public function with its options fixed, a description of its tensors, and an oracle: an independent
formula in float64, from `torch.distributions` or PyTorch's own losses where they have one. A new op is a new row of
`CASES`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import unigen_fast as uf
from unigen_fast import _ops
from unigen_fast._fused import FusedOp

OPS: dict[str, FusedOp] = {name: op for name, op in vars(_ops).items() if isinstance(op, FusedOp)}
NATIVE = {backend.name: backend.loaded for backend in uf.info().backends}
LOW_PRECISION = (torch.bfloat16, torch.float16)
SEED = 1234


# ---- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One tensor of a case: its shape, what its numbers mean, and whether it is differentiated."""

    shape: tuple[int, ...]
    kind: str = "normal"
    differentiable: bool = True


def _values(spec: Spec, dtype: torch.dtype) -> Tensor:
    shape = spec.shape
    if spec.kind == "labels":
        return torch.randint(0, 3, shape)
    values = {
        "normal": lambda: torch.randn(shape, dtype=torch.float64),
        "log_w": lambda: 3 * torch.randn(shape, dtype=torch.float64) - 1,
        # not centred: a mean of logits that cancels to 0 has no relative accuracy to speak of
        "logits": lambda: 2 * torch.randn(shape, dtype=torch.float64) + 0.7,
        "std": lambda: torch.rand(shape, dtype=torch.float64) + 0.3,
        "binary": lambda: torch.rand(shape).round(),
        "unit": lambda: torch.rand(shape, dtype=torch.float64),
        "weights": lambda: torch.rand(shape, dtype=torch.float64) + 0.1,
        "mask": lambda: torch.rand(shape).add(0.2).round(),
    }[spec.kind]()
    return values.to(dtype)


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


def make(
    case: "Case",
    rows: int,
    n: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    layout: str = "sliced",
    seed: int = 0,
) -> list[Tensor]:
    """The tensors of `case`, `n` along the reduced axis, those differentiated being leaves."""
    torch.manual_seed(seed)
    tensors = []
    for i, spec in enumerate(case.specs(rows, n)):
        x = _values(spec, dtype)
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


@contextmanager
def reference_path() -> Iterator[None]:
    """The public functions on their plain PyTorch references, differentiated by PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedOp, "_transformed", staticmethod(lambda: True))
        yield


@contextmanager
def recorded_ops() -> Iterator[list[tuple[str, Any, tuple[Any, ...]]]]:
    """Every forward and backward op that runs, as (name, overload, arguments)."""
    calls: list[tuple[str, Any, tuple[Any, ...]]] = []

    def recorder(overload: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append((overload._schema.name.partition("::")[2], overload, args))
            return overload(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
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


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) of a tensor of `dtype` against float64. Low precision: one rounding, subnormals included."""
    if dtype in LOW_PRECISION:
        info = torch.finfo(dtype)
        return info.eps, info.smallest_normal * info.eps
    return {torch.float64: 1e-10, torch.float32: 1e-5}[dtype], 1e-30


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


# ---- the table -------------------------------------------------------------------------------------------------------


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


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](rows)


def softplus(x: Tensor) -> Tensor:
    """log(e^0 + e^x): neither F.softplus, which turns linear, nor the references' logsigmoid."""
    return torch.logaddexp(x, torch.zeros_like(x))


def lme(x: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x, dim) - math.log(x.size(dim))


def iwgan(x: Tensor, dim: int | None, temperature: float = 1.0, detach: bool = True, reduction: str = "mean") -> Tensor:
    if dim is None:
        x, dim = x.reshape(-1), 0
    weights = torch.softmax(x / temperature, dim)
    return _reduced(((weights.detach() if detach else weights) * softplus(-x)).sum(dim), reduction)


def iwgan_grouped(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    losses = [iwgan(x.reshape(-1)[labels == label], None, **options) for label in labels.unique()]
    return torch.stack(losses).mean()


def kl(
    mean: Tensor,
    std: Tensor,
    prior_mean: Tensor | float = 0.0,
    prior_std: Tensor | float = 1.0,
    *,
    event_ndims: int = 1,
    free_bits: float = 0.0,
    per_dim: bool = False,
) -> Tensor:
    """Rows, by torch.distributions."""
    prior = Normal(torch.as_tensor(prior_mean, dtype=mean.dtype), torch.as_tensor(prior_std, dtype=mean.dtype))
    terms = kl_divergence(Normal(mean, std), prior)
    if per_dim:
        terms = terms.clamp(min=free_bits)
    rows = terms.sum(dim=tuple(range(-event_ndims, 0))) if event_ndims else terms
    return rows if per_dim else rows.clamp(min=free_bits)


def bce(logits: Tensor, x: Tensor, event_ndims: int = 1) -> Tensor:
    logits, x = torch.broadcast_tensors(logits, x)
    terms = -F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return terms.sum(dim=tuple(range(-event_ndims, 0))) if event_ndims else terms


def reparameterised(
    mean: Tensor, std: Tensor, shape: Sequence[int] | None = None, sample_dim: int | None = None
) -> Tensor:
    if sample_dim is not None:
        mean, std = mean.unsqueeze(sample_dim), std.unsqueeze(sample_dim)
    eps = noise(draw_rng_state(mean.device), mean.shape if shape is None else shape)
    return mean + std * eps.to(mean.device)


def clamped_std(logvar: Tensor, low: float, high: float) -> Tensor:
    """With bounds that no 16-bit number equals: there versions of PyTorch differ in the gradient."""
    return (0.5 * logvar.clamp(low, high)).exp()


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


IMPORTANCE = [
    Case(
        "log_mean_exp",
        lambda x: uf.log_mean_exp(x, dim=-1),
        last("log_w"),
        lambda x: lme(x, -1),
        empty_event=False,
    ),
    Case(
        "log_mean_exp[K,B]",
        lambda x: uf.log_mean_exp(x, dim=0),
        first("log_w"),
        lambda x: lme(x, 0),
        empty_event=False,
    ),
    Case(
        "log_mean_exp[5-D]",
        lambda x: uf.log_mean_exp(x, dim=2),
        lambda rows, n: [Spec((2, rows, n, 3, 2), "log_w")],
        lambda x: lme(x, 2),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "importance_weights",
        lambda x: uf.importance_weights(x, dim=-1, detach=False),
        last("log_w"),
        lambda x: torch.softmax(x, -1),
        empty_event=False,
    ),
    Case(
        "importance_weights[K,B,temperature]",
        lambda x: uf.importance_weights(x, dim=0, temperature=2.5, detach=False),
        first("log_w"),
        lambda x: torch.softmax(x / 2.5, 0),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "effective_sample_size",
        lambda x: uf.effective_sample_size(x, dim=-1),
        last("log_w"),
        lambda x: 1 / torch.softmax(x.detach(), -1).square().sum(-1),
        differentiable=False,
        empty_event=False,
    ),
    Case(
        "effective_sample_size[K,B]",
        lambda x: uf.effective_sample_size(x, dim=0),
        first("log_w"),
        lambda x: 1 / torch.softmax(x.detach(), 0).square().sum(0),
        differentiable=False,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "iwae_loss",
        lambda x: uf.iwae_loss(x, dim=-1),
        last("log_w"),
        lambda x: -lme(x, -1).mean(),
        empty_event=False,
    ),
    Case(
        "iwae_loss[K,B,sum]",
        lambda x: uf.iwae_loss(x, dim=0, reduction="sum"),
        first("log_w"),
        lambda x: -lme(x, 0).sum(),
        empty_event=False,
    ),
    Case(
        "iwae_loss[none]",
        lambda x: uf.iwae_loss(x, dim=1, reduction="none"),
        last("log_w"),
        lambda x: -lme(x, 1),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "iwae_loss[surrogate]",
        lambda x: uf.iwae_loss(x, dim=-1, value="surrogate"),
        last("log_w"),
        lambda x: -(torch.softmax(x.detach(), -1) * x).sum(-1).mean(),
        derivative=False,
        empty_event=False,
    ),
    Case(
        "iwae_loss[surrogate,none,K,B]",
        lambda x: uf.iwae_loss(x, dim=0, value="surrogate", reduction="none"),
        first("log_w"),
        lambda x: -(torch.softmax(x.detach(), 0) * x).sum(0),
        derivative=False,
        empty_event=False,
        every_size=False,
    ),
]

ADVERSARIAL = [
    Case(
        "importance_weighted_generator_loss",
        lambda x: uf.importance_weighted_generator_loss(fake=x),
        last("logits"),
        lambda x: iwgan(x, None),
        derivative=False,
    ),
    Case(
        "importance_weighted_generator_loss[dim]",
        lambda x: uf.importance_weighted_generator_loss(fake=x, dim=-1),
        last("logits"),
        lambda x: iwgan(x, -1),
        derivative=False,
        empty_event=False,
    ),
    Case(
        "importance_weighted_generator_loss[dim=0,temperature,sum]",
        lambda x: uf.importance_weighted_generator_loss(fake=x, dim=0, temperature=1.7, reduction="sum"),
        first("logits"),
        lambda x: iwgan(x, 0, 1.7, reduction="sum"),
        derivative=False,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "importance_weighted_generator_loss[attached]",
        lambda x: uf.importance_weighted_generator_loss(
            fake=x, dim=-1, detach=False, temperature=0.8, reduction="none"
        ),
        last("logits"),
        lambda x: iwgan(x, -1, 0.8, detach=False, reduction="none"),
        empty_event=False,
    ),
    Case(
        "importance_weighted_generator_loss[attached,whole]",
        lambda x: uf.importance_weighted_generator_loss(fake=x, detach=False, reduction="sum"),
        last("logits"),
        lambda x: iwgan(x, None, detach=False, reduction="sum"),
        every_size=False,
    ),
    Case(
        "importance_weighted_generator_loss[groups]",
        lambda x, labels: uf.importance_weighted_generator_loss(fake=x, groups=labels, detach=False),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows * n,), "labels")],
        lambda x, labels: iwgan_grouped(x, labels, detach=False),
        every_size=False,
        composed=True,
    ),
    Case(
        "discriminator_loss",
        lambda real, fake: uf.discriminator_loss(real=real, fake=fake),
        last("logits", count=2),
        lambda real, fake: softplus(-real).mean() + softplus(fake).mean(),
    ),
    Case(
        "discriminator_loss[hinge,sum,scale]",
        lambda real, fake: uf.discriminator_loss(real=real, fake=fake, kind="hinge", reduction="sum", scale=0.5),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((n, rows, 1), "logits")],
        lambda real, fake: 0.5 * ((1 - real).clamp(min=0).sum() + (1 + fake).clamp(min=0).sum()),
    ),
    Case(
        "discriminator_loss[none]",
        lambda real, fake: uf.discriminator_loss(real=real, fake=fake, reduction="none", scale=2.0),
        last("logits", count=2),
        lambda real, fake: 2 * (softplus(-real) + softplus(fake)),
        every_size=False,
        composed=True,
    ),
    Case(
        "discriminator_loss[lists,statistics]",
        lambda r1, r2, f1, f2: uf.discriminator_loss(real=[r1, r2], fake=[f1, f2], return_stats=True),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, 1, n // 2 + 1), "logits")] * 2,
        lambda r1, r2, f1, f2: statistics_by_hand([r1, r2], [f1, f2]),
        every_size=False,
    ),
    Case(
        "generator_loss",
        lambda fake: uf.generator_loss(fake=fake),
        last("logits"),
        lambda fake: F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake)),
    ),
    Case(
        "generator_loss[saturating,sum]",
        lambda fake: uf.generator_loss(fake=fake, kind="saturating", reduction="sum"),
        last("logits"),
        lambda fake: -F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="sum"),
    ),
    Case(
        "generator_loss[hinge,4-D]",
        lambda fake: uf.generator_loss(fake=fake, kind="hinge", scale=3.0),
        lambda rows, n: [Spec(block(rows, n), "logits")],
        lambda fake: -3 * fake.mean(),
        every_size=False,
    ),
    Case(
        "generator_loss[saturating,none]",
        lambda fake: uf.generator_loss(fake=fake, kind="saturating", reduction="none", scale=0.3),
        last("logits"),
        lambda fake: -0.3 * softplus(fake),
        every_size=False,
    ),
    Case(
        "log_ratio",
        lambda x: uf.log_ratio(x, y=0),
        last("logits"),
        lambda x: torch.sigmoid(-x).log() - torch.sigmoid(x).log(),
        every_size=False,
    ),
    Case(
        "log_ratio[labels]",
        lambda x, y: uf.log_ratio(x, y=y, reversed=True),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((n,), "binary", differentiable=False)],
        lambda x, y: (1 - 2 * y) * x,
        every_size=False,
        composed=True,
    ),
    Case(
        "log_discriminator",
        lambda x: uf.log_discriminator(x, 1),
        last("logits"),
        lambda x: torch.log_softmax(torch.stack([torch.zeros_like(x), x]), 0)[1],
    ),
    Case(
        "log_discriminator[labels,reversed]",
        lambda x, y: uf.log_discriminator(x, y, reversed=True),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, 1), "binary", differentiable=False)],
        lambda x, y: bce(x, 1 - y, 0),
        every_size=False,
    ),
]


def statistics_by_hand(reals: Sequence[Tensor], fakes: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    def of_each(logits: Sequence[Tensor], f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([f(x.detach()).to(x.dtype).mean() for x in logits])

    losses = [softplus(-r).mean() + softplus(f).mean() for r, f in zip(reals, fakes, strict=True)]
    return sum(losses[1:], losses[0]), (
        torch.stack(losses).detach(),
        of_each(reals, lambda x: x > 0),
        of_each(fakes, lambda x: x < 0),
        of_each(reals, lambda x: x),
        of_each(fakes, lambda x: x),
        of_each(reals, torch.sigmoid),
        of_each(fakes, torch.sigmoid),
    )


DIVERGENCE = [
    Case(
        "gaussian_kl",
        lambda m, v: uf.gaussian_kl(m, v),
        gaussian(),
        lambda m, v: kl(m, (v / 2).exp()).mean(),
    ),
    Case(
        "gaussian_kl[prior,none,scale]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv, reduction="none", scale=0.25),
        gaussian(prior=True),
        lambda m, v, pm, pv: 0.25 * kl(m, (v / 2).exp(), pm, (pv / 2).exp()),
    ),
    Case(
        "gaussian_kl[prior mean alone]",
        lambda m, v, pm: uf.gaussian_kl(m, v, pm, reduction="sum"),
        last(count=3),
        lambda m, v, pm: kl(m, (v / 2).exp(), pm).sum(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[prior logvar alone]",
        lambda m, v, pv: uf.gaussian_kl(m, v, None, pv),
        last(count=3),
        lambda m, v, pv: kl(m, (v / 2).exp(), 0.0, (pv / 2).exp()).mean(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[broadcast prior]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv),
        lambda rows, n: [Spec((2, rows, n)), Spec((rows, n)), Spec((rows, 1)), Spec((n,))],
        lambda m, v, pm, pv: kl(m, (v / 2).exp(), pm, (pv / 2).exp()).mean(),
        every_size=False,
        broadcast=True,
    ),
    Case(
        "gaussian_kl[std,prior]",
        lambda m, s, pm, ps: uf.gaussian_kl(m, s, pm, ps, spread="std", reduction="sum"),
        gaussian("std", prior=True),
        lambda m, s, pm, ps: kl(m, s, pm, ps).sum(),
    ),
    Case(
        "gaussian_kl[logstd,clamp]",
        lambda m, s: uf.gaussian_kl(m, s, spread="logstd", clamp_logvar=(-1.03, 1.57)),
        gaussian(),
        lambda m, s: kl(m, clamped_std(2 * s, -1.03, 1.57)).mean(),
    ),
    Case(
        "gaussian_kl[clamp,prior]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv, clamp_logvar=(-0.53, 0.7)),
        gaussian(prior=True),
        lambda m, v, pm, pv: kl(m, clamped_std(v, -0.53, 0.7), pm, clamped_std(pv, -0.53, 0.7)).mean(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[free bits of the row]",
        lambda m, v, f: uf.gaussian_kl(m * f, v * f, free_bits=1.0, reduction="none"),
        # rows scaled down by f lie on both sides of the bound, whatever the size of the event
        lambda rows, n: [Spec((rows, n)), Spec((rows, n)), Spec((rows, 1), "mask", differentiable=False)],
        lambda m, v, f: kl(m * f, (v * f / 2).exp(), free_bits=1.0),
        every_size=False,
        composed=True,
    ),
    Case(
        "gaussian_kl[free bits of each dimension]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv, free_bits=0.4, free_bits_mode="per_dim"),
        gaussian(prior=True),
        lambda m, v, pm, pv: kl(m, (v / 2).exp(), pm, (pv / 2).exp(), free_bits=0.4, per_dim=True).mean(),
    ),
    Case(
        "gaussian_kl[weights]",
        lambda m, v, w: uf.gaussian_kl(m, v, weights=w, scale=2.0),
        lambda rows, n: [Spec((rows, n)), Spec((rows, n)), Spec((rows,), "weights", differentiable=False)],
        lambda m, v, w: 2 * (kl(m, (v / 2).exp()) * w).mean(),
    ),
    Case(
        "gaussian_kl[weights,free bits,sum]",
        lambda m, v, w: uf.gaussian_kl(m, v, weights=w, free_bits=1.5, reduction="sum"),
        lambda rows, n: [Spec((2, rows, n)), Spec((2, rows, n)), Spec((rows,), "weights", differentiable=False)],
        lambda m, v, w: (kl(m, (v / 2).exp(), free_bits=1.5) * w).sum(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[weights with gradient]",
        lambda m, v, w: uf.gaussian_kl(m, v, weights=w),
        lambda rows, n: [Spec((rows, n)), Spec((rows, n)), Spec((rows,), "weights")],
        lambda m, v, w: (kl(m, (v / 2).exp()) * w).mean(),
        every_size=False,
        composed=True,
    ),
    Case(
        "gaussian_kl[normalised weights]",
        lambda m, v, w: uf.gaussian_kl(m, v, weights=w, normalize_weights=True, scale=0.5),
        lambda rows, n: [Spec((2, rows, n)), Spec((2, rows, n)), Spec((2, 1), "weights", differentiable=False)],
        lambda m, v, w: 0.5 * (kl(m, (v / 2).exp()) * w).sum() / w.expand(m.shape[:2]).sum(),
        every_size=False,
        composed=True,
    ),
    Case(
        "gaussian_kl[elementwise]",
        lambda m, v: uf.gaussian_kl(m, v, event_ndims=0, reduction="none"),
        gaussian(),
        lambda m, v: kl(m, (v / 2).exp(), event_ndims=0),
        every_size=False,
    ),
    Case(
        "gaussian_kl[4-D]",
        lambda m, v: uf.gaussian_kl(m, v, event_ndims=3),
        gaussian(shape=block),
        lambda m, v: kl(m, (v / 2).exp(), event_ndims=3).mean(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[5-D,none]",
        lambda m, v: uf.gaussian_kl(m, v, event_ndims=4, reduction="none"),
        gaussian(shape=video),
        lambda m, v: kl(m, (v / 2).exp(), event_ndims=4),
        every_size=False,
    ),
    Case(
        "sample_gaussian",
        lambda m, v: uf.sample_gaussian(m, v),
        gaussian(),
        lambda m, v: reparameterised(m, (v / 2).exp()),
        random=True,
    ),
    Case(
        "sample_gaussian[std,K first]",
        lambda m, s: uf.sample_gaussian(m, s, spread="std", num_samples=3),
        gaussian("std"),
        lambda m, s: reparameterised(m, s, (3, *m.shape), 0),
        random=True,
        every_size=False,
    ),
    Case(
        "sample_gaussian[logstd,clamp,K last]",
        lambda m, s: uf.sample_gaussian(
            m, s, spread="logstd", num_samples=2, sample_dim=-1, clamp_logvar=(-1.03, 1.07)
        ),
        gaussian(),
        lambda m, s: reparameterised(m, clamped_std(2 * s, -1.03, 1.07), (*m.shape, 2), -1),
        random=True,
        every_size=False,
    ),
    Case(
        "sample_gaussian_with_kl",
        lambda m, v: uf.sample_gaussian_with_kl(m, v),
        gaussian(),
        lambda m, v: (reparameterised(m, (v / 2).exp()), kl(m, (v / 2).exp())),
        random=True,
    ),
    Case(
        "sample_gaussian_with_kl[std,K in the middle]",
        lambda m, s: uf.sample_gaussian_with_kl(m, s, spread="std", num_samples=4, sample_dim=1),
        gaussian("std"),
        lambda m, s: (reparameterised(m, s, (m.size(0), 4, m.size(1)), 1), kl(m, s)),
        random=True,
        every_size=False,
    ),
    Case(
        "sample_gaussian_with_kl[4-D,clamp]",
        lambda m, v: uf.sample_gaussian_with_kl(m, v, event_ndims=3, clamp_logvar=(-0.8, 1.07)),
        gaussian(shape=block),
        lambda m, v: (reparameterised(m, clamped_std(v, -0.8, 1.07)), kl(m, clamped_std(v, -0.8, 1.07), event_ndims=3)),
        random=True,
        every_size=False,
    ),
]

LIKELIHOOD = [
    Case(
        "bernoulli_log_prob",
        lambda x, y: uf.bernoulli_log_prob(x, y),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "binary", differentiable=False)],
        bce,
    ),
    Case(
        "bernoulli_log_prob[soft]",
        lambda x, y: uf.bernoulli_log_prob(x, y),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "unit")],
        bce,
        every_size=False,
    ),
    Case(
        "bernoulli_log_prob[x.unsqueeze(1)]",
        lambda x, y: uf.bernoulli_log_prob(x, y.unsqueeze(1)),
        lambda rows, n: [Spec((rows, 3, n), "logits"), Spec((rows, n), "unit", differentiable=False)],
        lambda x, y: bce(x, y.unsqueeze(1)),
    ),
    Case(
        "bernoulli_log_prob[broadcast x with gradient]",
        lambda x, y: uf.bernoulli_log_prob(x, y),
        lambda rows, n: [Spec((2, rows, n), "logits"), Spec((n,), "unit")],
        bce,
        every_size=False,
        broadcast=True,
    ),
    Case(
        "bernoulli_log_prob[4-D]",
        lambda x, y: uf.bernoulli_log_prob(x, y, event_ndims=3),
        lambda rows, n: [Spec(block(rows, n), "logits"), Spec(block(rows, n), "binary", differentiable=False)],
        lambda x, y: bce(x, y, 3),
        every_size=False,
    ),
    Case(
        "bernoulli_log_prob[elementwise]",
        lambda x, y: uf.bernoulli_log_prob(x, y, event_ndims=0),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "unit")],
        lambda x, y: bce(x, y, 0),
        every_size=False,
    ),
]

CASES: list[Case] = [*IMPORTANCE, *ADVERSARIAL, *DIVERGENCE, *LIKELIHOOD]
