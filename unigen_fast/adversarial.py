"""Losses and log-ratios of discriminator logits, and the importance-weighted generator loss of IWGAN.

Conventions: logits l in, never probabilities; D(x) = sigma(l). `q(y=1|x) = D(x)`, and the reversed discriminator is
`q^r(y|x) = q(1-y|x)`. fp16 and bf16 are computed, and everything returned, in fp32.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from unigen_fast import _checks, _ops
from unigen_fast.reference import adversarial as _reference
from unigen_fast.reference import importance as _reference_importance
from unigen_fast.reference._common import upcast

Logits = Tensor | Sequence[Tensor]

_TERM = _reference.TERM_NUMBER
# of the real logits, of the fake ones
_DISCRIMINATOR = {
    "logistic": (_TERM["logistic_real"], _TERM["logistic_fake"]),
    "hinge": (_TERM["hinge_real"], _TERM["hinge_fake"]),
}
_GENERATOR = {"non_saturating": _TERM["logistic_real"], "saturating": _TERM["saturating"], "hinge": _TERM["linear"]}


class DiscriminatorStats(NamedTuple):
    """Detached statistics of both sides, from the loss's own pass: 0-dim, or `[n]` for lists of n tensors."""

    losses: Tensor
    real_accuracy: Tensor
    fake_accuracy: Tensor
    real_mean_logit: Tensor
    fake_mean_logit: Tensor
    real_mean_probability: Tensor
    fake_mean_probability: Tensor


def _gathered(**sides: Logits) -> tuple[list[Tensor], int]:
    """All tensors of the sides in one list, checked and in their promoted dtype, and how many each side has."""
    items: list[Tensor] = []
    n = 0
    for side, logits in sides.items():
        more = [logits] if isinstance(logits, Tensor) else _listed(side, logits)
        if items and len(more) != n:
            raise ValueError(
                f"{' and '.join(sides)}: got lists of {n} and {len(more)} tensors, expected as many of each"
            )
        n = len(more)
        items += more
    first: Tensor | None = None
    mixed = False
    for i, x in enumerate(items):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            _checks.floating(_name(i, n, sides), x)
        if first is None:
            first = x
        elif x.device != first.device:
            name, like = _name(i, n, sides), _name(0, n, sides)
            raise ValueError(f"{name}: got device {x.device}, expected {first.device} as {like}")
        elif x.dtype is not first.dtype:
            mixed = True
    return _checks.promoted(items) if mixed else items, n


def _listed(name: str, logits: Logits) -> list[Tensor]:
    if not isinstance(logits, Iterable):
        raise TypeError(f"{name}: expected a torch.Tensor or a list of them, got {type(logits).__name__}")
    items = list(logits)
    if not items:
        raise ValueError(f"{name}: got an empty list, expected at least one tensor of logits")
    return items


def _name(i: int, n: int, sides: Mapping[str, Logits]) -> str:
    side, logits = list(sides.items())[i // n]
    return side if isinstance(logits, Tensor) else f"{side}[{i % n}]"


@overload
def discriminator_loss(
    *,
    real: Logits,
    fake: Logits,
    kind: str = ...,
    reduction: str = ...,
    scale: float = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def discriminator_loss(
    *,
    real: Logits,
    fake: Logits,
    kind: str = ...,
    reduction: str = ...,
    scale: float = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, DiscriminatorStats]: ...
def discriminator_loss(
    *,
    real: Logits,
    fake: Logits,
    kind: str = "logistic",
    reduction: str = "mean",
    scale: float = 1.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DiscriminatorStats]:
    """Discriminator loss: scale · (E_real[term(l)] + E_fake[term(l)]), each side averaged over its own logits.

    | kind | real | fake |
    |---|---|---|
    | "logistic" | softplus(-l) | softplus(l) |
    | "hinge" | relu(1 - l) | relu(1 + l) |

    Args:
        real: logits of real samples, any shape; or a list of tensors (multi-scale discriminators), whose losses add up.
        fake: logits of generated samples; of its own batch size, and a list as long as `real` if that is one.
        kind: "logistic" or "hinge".
        reduction: "mean" or "sum" over each side's logits; "none" adds the two sides elementwise (shapes must agree).
        scale: multiplies the loss (0.5 in taming and LDM).
        return_stats: also return `DiscriminatorStats`, from the same pass ("mean" and "sum" only).

    Returns:
        The loss, or (loss, statistics). With "none", the shape of the logits, or a list of tensors for lists.

    Raises:
        TypeError: logits that are no floating-point tensors.
        ValueError: unknown `kind` or `reduction`, lists of different lengths, "none" with shapes that differ.

    Source: Hu et al. (2018), Eq. 3; Goodfellow et al. (2014), Eq. 1; Lim and Ye, "Geometric GAN" (2017), for the hinge.
    """
    _checks.choice("kind", kind, _DISCRIMINATOR)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    scale = _checks.number("scale", scale)
    items, n = _gathered(real=real, fake=fake)
    real_term, fake_term = _DISCRIMINATOR[kind]
    if reduction == "none":
        if return_stats:
            raise ValueError('return_stats: expected reduction "mean" or "sum", got "none"')
        rows = []
        for r, f in zip(items[:n], items[n:], strict=True):
            if r.shape != f.shape:
                shapes = f"real {tuple(r.shape)}, fake {tuple(f.shape)}"
                raise ValueError(f'reduction "none": expected equal shapes, got {shapes}')
            rows.append(_ops.logit_term((r,), real_term, scale) + _ops.logit_term((f,), fake_term, scale))
        return rows[0] if isinstance(real, Tensor) else rows  # type: ignore[return-value]
    if not return_stats:
        return _ops.logit_loss(items, n, real_term, fake_term, reduction, scale, False)
    loss, statistics = _ops.logit_loss(items, n, real_term, fake_term, reduction, scale, True, visible=2)
    of_real, of_fake = statistics[:n], statistics[n:]
    losses = of_real[:, 0] + of_fake[:, 0]
    columns = [column for i in (1, 2, 3) for column in (of_real[:, i], of_fake[:, i])]
    if isinstance(real, Tensor):
        losses, columns = losses[0], [column[0] for column in columns]
    return loss, DiscriminatorStats(losses, *columns)


def generator_loss(
    *,
    fake: Logits,
    real: Logits | None = None,
    kind: str = "non_saturating",
    reduction: str = "mean",
    scale: float = 1.0,
) -> Tensor:
    """Generator loss: scale · E_fake[term(l)].

    | kind | term |
    |---|---|
    | "non_saturating" | softplus(-l) = -log D |
    | "saturating" | -softplus(l) = log(1 - D) |
    | "hinge" | -l |

    Args:
        fake: logits of generated samples, any shape; or a list of tensors, whose losses add up.
        real: logits of real samples, for relativistic kinds; the kinds above take none.
        kind: "non_saturating", "saturating" or "hinge".
        reduction: "mean" or "sum" over the logits (of each tensor), or "none".
        scale: multiplies the loss.

    Returns:
        The loss; with "none", the shape of the logits, or a list of tensors for lists.

    Raises:
        TypeError: logits that are no floating-point tensors.
        ValueError: unknown `kind` or `reduction`; `real` given to a kind that takes none.

    Source: Hu et al. (2018), Eq. 5; Goodfellow et al. (2014), Sec. 3; Lim and Ye (2017).
    """
    _checks.choice("kind", kind, _GENERATOR)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    scale = _checks.number("scale", scale)
    if real is not None:
        raise ValueError(f"real: got logits, expected None for kind {kind!r}")
    term = _GENERATOR[kind]
    fakes, _ = _gathered(fake=fake)
    if reduction == "none":
        rows = [_ops.logit_term((f,), term, scale) for f in fakes]
        return rows[0] if isinstance(fake, Tensor) else rows  # type: ignore[return-value]
    return _ops.logit_loss(fakes, 0, term, term, reduction, scale, False)


def importance_weighted_generator_loss(
    *,
    fake: Tensor,
    dim: int | None = None,
    groups: Tensor | None = None,
    temperature: float = 1.0,
    detach: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """IWGAN's generator loss: sum_i w~_i softplus(-l_i), w~ = softmax(l / temperature), over the k samples of a group.

    w_i = q^r(y=0|x_i) / q(y=0|x_i) = D / (1 - D) = exp(l_i), so the self-normalised weights are a softmax of the
    logits. With detached weights and temperature 1 the gradient is -sigma(l_i) / sum_j exp(l_j). One sample per group
    is exactly the non-saturating loss; a group of the whole minibatch is the saturating gradient over the mean odds.

    Args:
        fake: logits of generated samples, any strides.
        dim: the dimension of a group's k samples; None: k is the whole tensor, as in the paper.
        groups: integer labels `[N]` for `fake` of N logits: weights normalised among the samples of one label (the
            paper leaves the grouping of its class-conditional IWGAN open; this choice is ours). Made of PyTorch ops.
        temperature: > 0; above 1 it flattens the weights.
        detach: whether the weights are constants, as in Eq. 16. Without it most gradients change sign.
        reduction: over the groups. One group: "mean" and "sum" agree. "none" has no fixed shape with `groups`.

    Returns:
        A scalar, or with "none" the shape of `fake` without `dim` (a scalar for `dim=None`).

    Raises:
        TypeError: `fake` is no floating-point tensor, `groups` no integer tensor.
        ValueError: `dim` out of range, empty, or given together with `groups`; `groups` of another shape; `temperature`
            not positive; unknown `reduction`, or "none" with `groups`.

    Source: Hu et al. (2018), Eq. 16.
    """
    _checks.floating("fake", fake)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    temperature = _checks.number("temperature", temperature, minimum=0.0, exclusive=True)
    if groups is not None:
        return _grouped(fake, groups, dim, temperature, detach, reduction)
    if dim is not None:
        dim = _checks.sample_dimension("fake", fake, dim)
    elif fake.numel() == 0:  # no group at all: the mean is NaN, the sum 0
        fake, dim = fake.reshape(0, 1), 1
    return _ops.importance_weighted_generator_loss((fake,), dim, temperature, detach, reduction)


def _grouped(fake: Tensor, groups: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str) -> Tensor:
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"groups: expected an integer tensor of labels, got {got}")
    if dim is not None:
        raise ValueError("groups: got dim as well, expected one of the two")
    if groups.shape != (fake.numel(),):
        raise ValueError(f"groups: got shape {tuple(groups.shape)}, expected ({fake.numel()},)")
    if groups.device != fake.device:
        raise ValueError(f"groups: got device {groups.device}, expected {fake.device}")
    if reduction == "none":
        raise ValueError('reduction: got "none", which has no fixed shape with groups; expected "mean" or "sum"')
    return _reference_importance.grouped_importance_weighted_generator_loss(
        fake, groups, temperature, detach, reduction
    )


def log_discriminator(logits: Tensor, y: int | Tensor, *, reversed: bool = False) -> Tensor:
    """log q(y|x) = y log sigma(l) + (1 - y) log sigma(-l), or the reversed log q^r(y|x) = log q(1-y|x).

    Args:
        logits: any shape.
        y: 0, 1, or a tensor of labels in [0, 1] broadcastable with `logits`.
        reversed: whether to give log q^r.

    Returns:
        Elementwise, in the shape that `logits` and `y` broadcast to. <= 0.

    Raises:
        TypeError: `logits` is no floating-point tensor.
        ValueError: a number `y` that is neither 0 nor 1; shapes that do not broadcast.

    Source: Hu et al. (2018), Sec. 3.1, Eq. 3.
    """
    _checks.floating("logits", logits)
    if isinstance(y, Tensor):
        y = 1 - y.to(logits.dtype) if reversed else y.to(logits.dtype)
        logits, y = _checks.same_kind(logits=logits, y=y)  # type: ignore[assignment]
        return _ops.bernoulli_log_prob((logits, y), 0)
    term = _TERM["logistic_real" if _label(y) != reversed else "logistic_fake"]
    return _ops.logit_term((logits,), term, -1.0)


def log_ratio(logits: Tensor, *, y: int | Tensor | tuple[int, int] = 1, reversed: bool = False) -> Tensor:
    """log q(y|x) / q(1-y|x): l for y = 1, -l for y = 0; the reversed ratio has the other sign.

    With multi-class logits, last dimension C, and `y=(a, b)`: log q(a|x) / q(b|x) = l_a - l_b.

    The signed copy is one kernel; a tensor `y` and the multi-class form are PyTorch ops, each a single elementwise pass
    that nothing could be fused with.

    Args:
        logits: any shape; `[..., C]` with `y=(a, b)`.
        y: 0, 1, a tensor of 0s and 1s broadcastable with `logits`, or a pair of classes.
        reversed: whether to give the ratio of q^r.

    Returns:
        Elementwise; without the last dimension for a pair of classes.

    Raises:
        TypeError: `logits` is no floating-point tensor.
        ValueError: `y` is no label, a class is out of range, or shapes do not broadcast.

    Source: Hu et al. (2018), Eq. 16, whose weight is exp(log_ratio(l, y=0, reversed=True)).
    """
    _checks.floating("logits", logits)
    sign = -1.0 if reversed else 1.0
    if isinstance(y, tuple):
        if len(y) != 2 or logits.dim() == 0:
            raise ValueError(f"y: got {y} for logits {tuple(logits.shape)}, expected two classes of the last dim")
        a, b = (_class(logits, c) for c in y)
        pair = upcast(logits)
        return (pair.select(-1, a) - pair.select(-1, b)) * sign
    if isinstance(y, Tensor):
        y = y.to(logits.dtype)
        logits, y = _checks.same_kind(logits=logits, y=y)  # type: ignore[assignment]
        return upcast(logits) * torch.where(y > 0.5, sign, -sign)
    return _ops.logit_term((logits,), _TERM["linear"], -sign if _label(y) else sign)


def _label(y: int) -> bool:
    if y not in (0, 1):
        raise ValueError(f"y: got {y!r}, expected 0, 1 or a tensor of labels")
    return bool(y)


def _class(logits: Tensor, c: int) -> int:
    if not isinstance(c, int) or not -logits.size(-1) <= c < logits.size(-1):
        raise ValueError(f"y: got class {c!r}, expected one of the {logits.size(-1)} of logits {tuple(logits.shape)}")
    return c
