"""Losses and log-ratios of discriminator logits, and the importance-weighted generator loss of IWGAN.

Conventions: logits l in, never probabilities; D(x) = sigma(l). `q(y=1|x) = D(x)`, and the reversed discriminator is
`q^r(y|x) = q(1-y|x)`. fp16 and bf16 are computed, and everything returned, in fp32.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Number
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from unigen_fast import _checks, _ops, _values
from unigen_fast._fused import FusedOp, beside
from unigen_fast._private import transforms_active
from unigen_fast.reference import adversarial as _reference
from unigen_fast.reference import importance as _reference_importance
from unigen_fast.reference._common import reduce_rows, upcast

Logits = Tensor | Sequence[Tensor]

_TERM = _reference.TERM_NUMBER


class _Terms(NamedTuple):
    """A kind of loss: factor · (mean of the real logits' term + mean of the fake ones'), or of the fake ones' alone.

    `coupling`: "" where each logit counts by itself; "pairs" of real and fake logits, whose difference has the real
    term; "averages" and "ratios" as in `reference.coupled_logit_loss`.
    """

    real: str
    fake: str
    factor: float = 1.0
    coupling: str = ""


_DISCRIMINATOR = {
    "logistic": _Terms("logistic_real", "logistic_fake"),
    "hinge": _Terms("hinge_real", "hinge_fake"),
    "least_squares": _Terms("least_squares_real", "least_squares_fake"),
    "wasserstein": _Terms("linear", "identity"),
    "relativistic": _Terms("logistic_real", "", coupling="pairs"),
    "relativistic_average": _Terms("logistic_real", "logistic_fake", 0.5, "averages"),
    "relativistic_average_least_squares": _Terms("least_squares_real", "least_squares_minus", 1.0, "averages"),
    "relativistic_average_hinge": _Terms("hinge_real", "hinge_fake", 0.5, "averages"),
    "kl_wgan": _Terms("hinge_real", "hinge_fake", coupling="ratios"),
    "fgan_kl": _Terms("kl_real", "kl_fake"),
    "fgan_reverse_kl": _Terms("reverse_kl_real", "reverse_kl_fake"),
    "fgan_pearson": _Terms("linear", "pearson_fake"),
    "fgan_neyman": _Terms("expm1_real", "neyman_fake"),
    "fgan_hellinger": _Terms("expm1_real", "hellinger_fake"),
    "fgan_js": _Terms("js_real", "js_fake"),
}
_FGAN = [kind for kind in _DISCRIMINATOR if kind.startswith("fgan")]
_GENERATOR = {
    "non_saturating": _Terms("", "logistic_real"),
    "saturating": _Terms("", "saturating"),
    "hinge": _Terms("", "linear"),
    "least_squares": _Terms("", "least_squares_real"),
    "wasserstein": _Terms("", "linear"),
    "relativistic": _Terms("logistic_fake", "", coupling="pairs"),
    "relativistic_average": _Terms("logistic_fake", "logistic_real", 0.5, "averages"),
    "relativistic_average_least_squares": _Terms("least_squares_minus", "least_squares_real", 1.0, "averages"),
    "relativistic_average_hinge": _Terms("hinge_fake", "hinge_real", 0.5, "averages"),
    "kl_wgan": _Terms("", "linear", coupling="ratios"),
    **{kind: _Terms("", _DISCRIMINATOR[kind].fake, -1.0) for kind in _FGAN},
}


# what the discriminator gives is compared with numbers, and not the log-odds of a probability
_NO_LOG_ODDS = {kind for kind in _DISCRIMINATOR if "least_squares" in kind} | {"wasserstein", "kl_wgan", *_FGAN}


class DiscriminatorStats(NamedTuple):
    """Detached statistics of both sides, from the loss's own pass: 0-dim, or `[n]` for lists of n tensors.

    `losses` are those of each scale, averaged, without `scale`. Accuracy is the share of logits on their side of 0 (of
    1/2 for "least_squares", of 1 for "fgan_kl"), probability is sigma(l). Of "relativistic…" kinds both are those of
    the relative logits, l_r - l_f or l less the mean of the other side.
    """

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
    first = items[0]
    if not isinstance(first, Tensor) or first.dtype not in _checks.DTYPES:
        _checks.floating(_name(0, n, sides), first)
    device, dtype, mixed = first.device, first.dtype, False
    for i, x in enumerate(items):  # a dozen of them, most often alike: what is true of the first is not asked again
        if not isinstance(x, Tensor) or x.dtype is not dtype or x.layout is not torch.strided or x.is_nested:
            _checks.floating(_name(i, n, sides), x)
            mixed = True
        if x.device != device:
            name, like = _name(i, n, sides), _name(0, n, sides)
            raise ValueError(f"{name}: got device {x.device}, expected {device} as {like}")
    return _checks.promoted(items) if mixed else items, n


def _check_values(items: list[Tensor], n: int, kind: str, **sides: Logits) -> None:
    """Numbers, and of kinds whose logit is that of a probability, no probabilities."""
    check = _values.numbers if kind in _NO_LOG_ODDS else _values.logits
    for i, x in enumerate(items):
        check(**{_name(i, n, sides): x})


def _listed(name: str, logits: Logits) -> list[Tensor]:
    if not isinstance(logits, Iterable) or hasattr(logits, "__array__"):
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
    | "least_squares" | 1/2 (l - 1)² | 1/2 l² |
    | "wasserstein" | -l | l |
    | "relativistic" | softplus(-(l_r - l_f)) of the pairs | |
    | "relativistic_average" | 1/2 softplus(-(l - m_f)) | 1/2 softplus(l - m_r) |
    | "relativistic_average_least_squares" | 1/2 (l - m_f - 1)² | 1/2 (l - m_r + 1)² |
    | "relativistic_average_hinge" | 1/2 relu(1 - (l - m_f)) | 1/2 relu(1 + (l - m_r)) |
    | "kl_wgan" | relu(1 - l) | relu(1 + r·l) |
    | "fgan_kl" | -l | exp(l - 1) |
    | "fgan_reverse_kl" | exp(l) | -1 - l |
    | "fgan_pearson" | -l | l²/4 + l |
    | "fgan_neyman" | exp(l) - 1 | 2 - 2 exp(l/2) |
    | "fgan_hellinger" | exp(l) - 1 | exp(-l) - 1 |
    | "fgan_js" | softplus(-l) - log 2 | softplus(l) - log 2 |

    m_r and m_f are the means of a tensor's real and fake logits; gradients flow through them. TF-GAN has no 1/2 in the
    relativistic average losses, and VITS and HiFi-GAN none in least squares: `scale=2` gives theirs. r = exp(l_f -
    log-mean-exp(l_f)) has mean 1 and is a constant (in the authors' code, gradients flow through it).

    f-GAN: -T(l) and f*(T(l)), so that -loss is a lower bound of the divergence. Three of its activations T fall with
    the logit, and so does the best l as a function of p/q: it is -log p/q with "fgan_reverse_kl", -2 log p/q with
    "fgan_neyman", -1/2 log p/q with "fgan_hellinger"; statistics expect real logits below 0 there.

    Args:
        real: logits of real samples, any shape; or a list of tensors (multi-scale discriminators), whose losses add up.
        fake: logits of generated samples; of its own batch size ("relativistic": of the shape of `real`), and a list as
            long as `real` if that is one.
        kind: one of the above.
        reduction: "mean" or "sum" over each side's logits; "none" adds the two sides elementwise (shapes must agree).
        scale: multiplies the loss (0.5 in taming and LDM).
        return_stats: also return `DiscriminatorStats`, from the same pass ("mean" and "sum" only).

    "relativistic" is made of a difference and the op of the other kinds, and so is "none" of the coupled ones.

    Returns:
        The loss, or (loss, statistics). With "none", the shape of the logits, or a list of tensors for lists.

    Raises:
        TypeError: logits that are no floating-point tensors.
        ValueError: unknown `kind` or `reduction`, lists of different lengths, shapes that differ with "none" or
            "relativistic".

    Source: Hu et al. (2018), Eq. 3; Goodfellow et al. (2014), Eq. 1; Lim and Ye, "Geometric GAN" (2017), hinge; Mao et
    al. (2017), Eq. 2, least squares; Arjovsky et al. (2017), Eq. 2; Jolicoeur-Martineau, "The relativistic
    discriminator" (2018); Song and Ermon, "Bridging the gap between f-GANs and Wasserstein GANs" (2020); Nowozin et
    al., "f-GAN" (2016), Table 2.
    """
    _checks.choice("kind", kind, _DISCRIMINATOR)
    if reduction not in _checks.REDUCTIONS:
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if type(scale) is not float or scale != 1:
        scale = _checks.number("scale", scale, differentiable=True)
    items, n = _gathered(real=real, fake=fake)
    if _values.on:
        _check_values(items, n, kind, real=real, fake=fake)
    terms = _DISCRIMINATOR[kind]
    if reduction == "none":
        if return_stats:
            raise ValueError('return_stats: expected reduction "mean" or "sum", got "none"')
        rows = _rows(items, n, terms, scale)
        return rows[0] if isinstance(real, Tensor) else rows  # type: ignore[return-value]
    if not return_stats:
        return _reduced(items, n, terms, reduction, scale)
    loss, statistics = _reduced(items, n, terms, reduction, scale, True)
    if terms.coupling == "pairs":
        right, probability = statistics[:, 1], statistics[:, 3]
        mean_logit = torch.stack([upcast(r.detach()).mean() for r in items[:n]])
        losses = statistics[:, 0]
        columns = [right, right, mean_logit, mean_logit - statistics[:, 2], probability, 1 - probability]
    else:
        of_real, of_fake = statistics[:n], statistics[n:]
        losses = of_real[:, 0] + of_fake[:, 0]
        if terms.factor != 1:
            losses = losses * terms.factor
        columns = [column for i in (1, 2, 3) for column in (of_real[:, i], of_fake[:, i])]
    if isinstance(real, Tensor):
        losses, columns = losses[0], [column[0] for column in columns]
    return loss, DiscriminatorStats(losses, *columns)


def _reduced(
    items: list[Tensor], reals: int, terms: _Terms, reduction: str, scale: float, return_stats: bool = False
) -> Any:
    """The loss of real tensors and then fake ones; with `return_stats` the op's statistics as well."""
    scale = scale * terms.factor
    visible = 2 if return_stats else 1
    if terms.coupling == "pairs":
        items, term = _differences(items, reals), _TERM[terms.real]
        return _ops.logit_loss(items, reals, term, term, reduction, scale, return_stats, visible=visible)
    fake_term = _TERM[terms.fake]
    real_term = _TERM[terms.real] if terms.real else fake_term
    if not (return_stats or terms.coupling) and type(scale) is float and _few(items):
        return _reference.sum_of_terms(items, reals, real_term, fake_term, reduction, scale)
    if terms.coupling:
        options = (reals, terms.coupling, real_term, fake_term, reduction, scale, return_stats)
        return _ops.coupled_logit_loss(items, *options, visible=visible)
    return _ops.logit_loss(items, reals, real_term, fake_term, reduction, scale, return_stats, visible=visible)


def _few(items: list[Tensor]) -> bool:
    """Whether the reference takes less time than to find out who is to serve: few logits, and no kernels."""
    if FusedOp.devices:
        return False
    for x in items:
        if type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu or not 0 < x.numel() <= 2**14:
            return False
    return True


def _rows(items: list[Tensor], reals: int, terms: _Terms, scale: float) -> list[Tensor]:
    """The loss of each logit, or pair of them."""
    scale = scale * terms.factor
    if terms.coupling == "pairs":
        return [_ops.logit_term((d,), _TERM[terms.real], scale) for d in _differences(items, reals)]
    fakes = items[reals:]
    if not terms.real:
        return [_ops.logit_term((_coupled(f, None, terms),), _TERM[terms.fake], scale) for f in fakes]
    rows = []
    for r, f in zip(items[:reals], fakes, strict=True):
        if r.shape != f.shape:
            raise ValueError(f'reduction "none": {_unequal(r, f)}')
        of_real = r if terms.coupling == "ratios" else _coupled(r, f, terms)
        of_fake = _coupled(f, r, terms)
        of_real = _ops.logit_term((of_real,), _TERM[terms.real], scale)
        rows.append(of_real + _ops.logit_term((of_fake,), _TERM[terms.fake], scale))
    return rows


def _coupled(logits: Tensor, other: Tensor | None, terms: _Terms) -> Tensor:
    if terms.coupling == "averages" and other is not None:
        return upcast(logits) - upcast(other).mean()
    return _reference.ratio_weighted(upcast(logits))[0] if terms.coupling == "ratios" else logits


def _differences(items: list[Tensor], reals: int) -> list[Tensor]:
    differences = []
    for r, f in zip(items[:reals], items[reals:], strict=True):
        if r.shape != f.shape:
            raise ValueError(f'kind "relativistic": {_unequal(r, f)}')
        differences.append(upcast(r) - upcast(f))
    return differences


def _unequal(real: Tensor, fake: Tensor) -> str:
    return f"expected equal shapes, got real {tuple(real.shape)}, fake {tuple(fake.shape)}"


def loss_and_sides(real: Logits, fake: Logits, kind: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss of an uncoupled kind; detached and unscaled, the means of its terms over each tensor's logits."""
    items, n = _gathered(real=real, fake=fake)
    loss, statistics = _reduced(items, n, _DISCRIMINATOR[kind], "mean", scale, True)
    return loss, statistics[:n, 0], statistics[n:, 0]


def loss_of_each(fake: Logits, kind: str, scale: float) -> tuple[Tensor, Tensor]:
    """The generator's mean loss of an uncoupled kind and, detached and unscaled, that of each tensor."""
    items, _ = _gathered(fake=fake)
    loss, statistics = _reduced(items, 0, _GENERATOR[kind], "mean", scale, True)
    return loss, statistics[:, 0]


def generator_loss(
    *,
    fake: Logits,
    real: Logits | None = None,
    kind: str = "non_saturating",
    reduction: str = "mean",
    scale: float = 1.0,
) -> Tensor:
    """Generator loss: scale · E_fake[term(l)], of relativistic kinds scale · (E_real[term(l)] + E_fake[term(l)]).

    | kind | fake | real |
    |---|---|---|
    | "non_saturating" | softplus(-l) = -log D | |
    | "saturating" | -softplus(l) = log(1 - D) | |
    | "hinge", "wasserstein" | -l | |
    | "least_squares" | 1/2 (l - 1)² | |
    | "relativistic" | softplus(-(l_f - l_r)) of the pairs | |
    | "relativistic_average" | 1/2 softplus(-(l - m_r)) | 1/2 softplus(l - m_f) |
    | "relativistic_average_least_squares" | 1/2 (l - m_r - 1)² | 1/2 (l - m_f + 1)² |
    | "relativistic_average_hinge" | 1/2 relu(1 - (l - m_r)) | 1/2 relu(1 + (l - m_f)) |
    | "kl_wgan" | -r·l | |
    | "fgan_kl", "fgan_reverse_kl", … | minus the fake term of `discriminator_loss` | |

    m_r, m_f and r are those of `discriminator_loss`, and so is what is said there of factors 1/2 and of signs.

    Args:
        fake: logits of generated samples, any shape; or a list of tensors, whose losses add up.
        real: logits of real samples, or a list of as many tensors: of relativistic kinds, which need them; the other
            kinds take none.
        kind: one of the above.
        reduction: "mean" or "sum" over the logits (of each tensor, and side), or "none".
        scale: multiplies the loss.

    Returns:
        The loss; with "none", the shape of the logits, or a list of tensors for lists.

    Raises:
        TypeError: logits that are no floating-point tensors.
        ValueError: unknown `kind` or `reduction`; `real` given to a kind that takes none, or missing; lists of
            different lengths; shapes that differ with "relativistic", or with "none" and a relativistic kind.

    Source: Hu et al. (2018), Eq. 5; Goodfellow et al. (2014), Sec. 3; and as for `discriminator_loss`.
    """
    _checks.choice("kind", kind, _GENERATOR)
    if reduction not in _checks.REDUCTIONS:
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if type(scale) is not float or scale != 1:
        scale = _checks.number("scale", scale, differentiable=True)
    terms = _GENERATOR[kind]
    if (real is not None) != bool(terms.real):
        got, expected = ("None", "logits") if real is None else ("logits", "None")
        raise ValueError(f"real: got {got}, expected {expected} for kind {kind!r}")
    if real is None:
        items, reals = _gathered(fake=fake)[0], 0
    else:
        items, reals = _gathered(real=real, fake=fake)
    if _values.on:
        sides = {"fake": fake} if real is None else {"real": real, "fake": fake}
        _check_values(items, reals or len(items), kind, **sides)
    if reduction == "none":
        rows = _rows(items, reals, terms, scale)
        return rows[0] if isinstance(fake, Tensor) else rows  # type: ignore[return-value]
    return _reduced(items, reals, terms, reduction, scale)


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
            paper leaves the grouping of its class-conditional IWGAN open; this choice is ours). Any integers; on a
            GPU each is compared with each, which beyond 16384 samples is left to PyTorch ops that sort.
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
    temperature = _checks.temperature(temperature, detach)
    if _values.on:
        _values.logits(fake=fake)
    if groups is not None:
        return _grouped(fake, groups, dim, temperature, detach, reduction)
    if dim is not None:
        dim = _checks.sample_dimension("fake", fake, dim)
    elif fake.numel() == 0:  # no group at all: the mean is NaN, the sum 0
        fake, dim = fake.reshape(0, 1), 1
    if _checks.learned(temperature):
        return _reference_importance.importance_weighted_generator_loss(fake, dim, temperature, detach, reduction)[0]
    return _ops.importance_weighted_generator_loss((fake,), dim, temperature, detach, reduction)


_MOST_COMPARED = 2**14  # samples of which a GPU compares each with each


def _labels_of(fake: Tensor, groups: Tensor, dim: int | None, reduction: str) -> Tensor:
    """`groups`, checked, as int64."""
    if isinstance(groups, Tensor):
        _checks.tensor("groups", groups)
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
    return groups.to(torch.int64)


def _grouped(fake: Tensor, groups: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str) -> Tensor:
    flat, labels = fake.reshape(-1), _labels_of(fake, groups, dim, reduction)
    if (flat.numel() > _MOST_COMPARED and flat.device.type != "cpu") or _checks.learned(temperature):
        reference = _reference_importance.grouped_importance_weighted_generator_loss
        return reference(flat, labels, temperature, detach, reduction)[0]
    return _ops.grouped_importance_weighted_generator_loss((flat, labels), temperature, detach, reduction)


def log_discriminator(logits: Tensor, y: int | Tensor, *, reversed: bool = False) -> Tensor:
    """log q(y|x) = y log sigma(l) + (1 - y) log sigma(-l), or the reversed log q^r(y|x) = log q(1-y|x).

    Args:
        logits: any shape.
        y: 0, 1, or a tensor of labels in [0, 1] of the shape of `logits`, 1 where it is the same for all.
        reversed: whether to give log q^r.

    Returns:
        Elementwise, in the shape of `logits`. <= 0.

    Raises:
        TypeError: `logits` is no floating-point tensor.
        ValueError: a number `y` that is neither 0 nor 1; shapes that differ other than by a written 1.

    Source: Hu et al. (2018), Sec. 3.1, Eq. 3.
    """
    _checks.floating("logits", logits)
    if _values.on:
        _values.logits(logits=logits)
        _values.labels("y", y)
    if isinstance(y, Tensor):
        y = _checks.tensor("y", y).to(logits.dtype)
        # log q(1-y|l) = log q(y|-l), and a sign is exact where 1 - y is rounded to the dtype
        logits, y = _checks.elementwise(logits=-logits if reversed else logits, y=y)
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
        y: 0, 1, a tensor of 0s and 1s of the shape of `logits`, 1 where it is the same for all, or a pair of classes.
        reversed: whether to give the ratio of q^r.

    Returns:
        Elementwise; without the last dimension for a pair of classes.

    Raises:
        TypeError: `logits` is no floating-point tensor.
        ValueError: `y` is no label, a class is out of range, or shapes differ other than by a written 1.

    Source: Hu et al. (2018), Eq. 16, whose weight is exp(log_ratio(l, y=0, reversed=True)).
    """
    _checks.floating("logits", logits)
    if _values.on:
        _values.logits(logits=logits)
        _values.labels("y", y)
    sign = -1.0 if reversed else 1.0
    if isinstance(y, tuple):
        if len(y) != 2 or logits.dim() == 0:
            raise ValueError(f"y: got {y} for logits {tuple(logits.shape)}, expected two classes of the last dim")
        a, b = (_class(logits, c) for c in y)
        pair = upcast(logits)
        return (pair.select(-1, a) - pair.select(-1, b)) * sign
    if isinstance(y, Tensor):
        logits, y = _checks.elementwise(logits=logits, y=_checks.tensor("y", y).to(logits.dtype))
        return upcast(logits) * torch.where(y > 0.5, sign, -sign)
    return _ops.logit_term((logits,), _TERM["linear"], -sign if _label(y) else sign)


def density_ratio_kl(logits: Tensor, *, reduction: str = "mean") -> Tensor:
    """KL(p‖q) = E_p[log p/q], estimated from the logits of samples of p: their mean.

    The logits are those of a discriminator between p (y = 1) and q (y = 0) in equal numbers, of which the best has
    l = log p/q. (FactorVAE's total correlation; the adversarial KL of density-ratio estimation.)

    Args:
        logits: of samples of p, any shape.
        reduction: "mean", "sum" or "none" over the samples.

    Returns:
        A scalar, or with "none" the shape of `logits`.

    Raises:
        TypeError: `logits` is no floating-point tensor.
        ValueError: unknown `reduction`.

    Source: Sugiyama et al., "Density ratio estimation in machine learning" (2012); Kim and Mnih (2018), Sec. 3.
    """
    _checks.floating("logits", logits)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.logits(logits=logits)
    term = _TERM["identity"]
    if reduction == "none":
        return _ops.logit_term((logits,), term, 1.0)
    return _ops.logit_loss([logits], 0, term, term, reduction, 1.0, False)


def density_ratio_js(*, real: Logits, fake: Logits) -> Tensor:
    """JSD(p‖q) in nats, from logits of samples of both: log 2 - (E_p[softplus(-l)] + E_q[softplus(l)]) / 2.

    A lower bound for any discriminator, and exact for the best one; <= log 2. It is minus half the "fgan_js" loss.

    Args:
        real: logits of samples of p (y = 1), any shape; or a list of tensors, whose estimates add up.
        fake: logits of samples of q (y = 0), of its own batch size.

    Returns:
        A scalar.

    Raises:
        TypeError: logits that are no floating-point tensors.
        ValueError: lists of different lengths, or tensors on two devices.

    Source: Goodfellow et al. (2014), Eq. 5; Nowozin et al. (2016), Sec. 2.2.
    """
    items, n = _gathered(real=real, fake=fake)
    if _values.on:
        _check_values(items, n, "logistic", real=real, fake=fake)
    return _reduced(items, n, _DISCRIMINATOR["fgan_js"], "mean", -0.5)


def r1_penalty(*, logits: Tensor, inputs: Tensor, gamma: float = 10.0, reduction: str = "mean") -> Tensor:
    """R1 regulariser: gamma/2 · E[‖∇_x l(x)‖²], the squared norm of each sample's own gradient.

    Of generated samples it is R2. The logits, not a loss, are differentiated, with a graph, so that the penalty trains.
    A composition: the gradient is the network's, and what follows it one pass.

    Args:
        logits: of `inputs`, computed from them; any shape, whose entries are summed for each sample. A network that
            mixes the samples of a batch (batch normalisation in training) mixes their gradients.
        inputs: samples `[N, …]` that require grad.
        gamma: >= 0; 10 in StyleGAN's first configurations.
        reduction: "mean" or "sum" over the N samples; "none" returns `[N]`.

    Returns:
        A scalar, or `[N]`; fp32 for fp16 and bf16 inputs.

    Raises:
        TypeError: `logits` or `inputs` is no floating-point tensor.
        ValueError: `inputs` without requires_grad, or of no dimension; `logits` without a graph, as under
            `torch.no_grad`, `torch.vmap` or `torch.func.jvp`; unknown `reduction`.
        RuntimeError: under `torch.export`, which takes a gradient within its graph for a constant.

    Under `torch.compile(fullgraph=True)` take `gradient_penalty` with target=0: a compiler needs the network itself.

    Source: Mescheder et al., "Which training methods for GANs do actually converge?" (2018), Eq. 9.
    """
    _checks.floating("logits", logits)
    _refuse_export("r1_penalty")
    gamma = _checks.number("gamma", gamma, minimum=0.0, differentiable=True)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.numbers(logits=logits, inputs=inputs)
    return reduce_rows(_squared_gradient_norms(logits, "inputs", inputs), reduction, 0.5 * gamma)


def gradient_penalty(
    *,
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    weight: float = 10.0,
    target: float = 1.0,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """WGAN-GP's penalty: weight · E[(‖∇_x l(x)‖ - target)²] at x = a·real + (1 - a)·fake, a ~ U(0, 1) for each sample.

    The norm is that of each sample's own gradient, sqrt(sum of squares + 1e-10): its derivative is finite at 0, as in
    TF-GAN. `real` and `fake` get no gradient. A composition: the gradient is the network's, and what follows it one
    pass.

    Args:
        discriminator: logits of its argument, any shape, whose entries are summed for each sample.
        real: samples `[N, …]`.
        fake: generated samples of the same shape.
        weight: lambda, >= 0.
        target: the norm asked for: 1, or 0 for a 0-centred penalty.
        reduction: "mean" or "sum" over the N samples; "none" returns `[N]`.
        generator: of the random numbers a.

    Returns:
        A scalar, or `[N]`; fp32 for fp16 and bf16 samples.

    Raises:
        TypeError: `real` or `fake` is no floating-point tensor, or the discriminator returns none.
        ValueError: shapes that differ, or of no dimension; a discriminator whose logits do not hang on its argument
            (compiled, or under `torch.func`, their gradient is 0); unknown `reduction`.
        RuntimeError: under `torch.export`, which takes a gradient within its graph for a constant.

    Source: Gulrajani et al., "Improved training of Wasserstein GANs" (2017), Eq. 3.
    """
    _checks.floating("real", real)
    _checks.floating("fake", fake)
    weight = _checks.number("weight", weight, minimum=0.0, differentiable=True)
    target = _checks.number("target", target, minimum=0.0, differentiable=True)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if real.shape != fake.shape or real.dim() == 0:
        shapes = f"real {tuple(real.shape)}, fake {tuple(fake.shape)}"
        raise ValueError(f"expected samples [N, …] of one shape, got {shapes}")
    if real.device != fake.device:
        raise ValueError(f"fake: got device {fake.device}, expected {real.device} as real")
    if _values.on:
        _values.numbers(real=real, fake=fake)
    real, fake = _checks.promoted([real.detach(), fake.detach()])
    shape = (real.size(0), *[1] * (real.dim() - 1))
    # a dynamic shape beside generator=None breaks torch.compile's graph
    kind: dict[str, Any] = {"dtype": real.dtype, "device": real.device}
    share = torch.rand(shape, **kind) if generator is None else torch.rand(shape, generator=generator, **kind)
    x = torch.lerp(fake, real, beside(share, real))
    with torch.enable_grad():
        if torch.compiler.is_compiling() or transforms_active():
            _refuse_export("gradient_penalty")
            gradient = torch.func.grad(lambda x: _checks.floating("discriminator(x)", discriminator(x)).sum())(x)
            squares = _squared_norms(gradient)
        else:
            x.requires_grad_()
            logits = _checks.floating("discriminator(x)", discriminator(x))
            squares = _squared_gradient_norms(logits, "discriminator(x)", x)
        return reduce_rows((torch.sqrt(squares + 1e-10) - target).square(), reduction, weight)


def _squared_gradient_norms(logits: Tensor, name: str, inputs: Tensor) -> Tensor:
    """‖∇_x sum of l‖² of each sample, with a graph."""
    _checks.floating(name, inputs)
    if inputs.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions, expected samples [N, …]")
    if not inputs.requires_grad or not logits.requires_grad:
        without = " (vmap and jvp have none: gradient_penalty takes the discriminator itself)"
        without = without if transforms_active() else ""
        raise ValueError(
            f"{name}: expected logits that were computed from samples that require grad, got no graph{without}"
        )
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name}: expected logits that were computed from these samples, got others")
    return _squared_norms(gradient)


def _squared_norms(gradient: Tensor) -> Tensor:
    return upcast(gradient).flatten(1).square().sum(1) if gradient.dim() > 1 else upcast(gradient).square()


def _refuse_export(function: str) -> None:
    if torch.compiler.is_exporting():  # it takes a gradient within the graph for a constant
        raise RuntimeError(f"{function}: torch.export keeps no gradients within its graph; export the network alone")


def _label(y: int) -> bool:
    if not isinstance(y, Number):
        raise TypeError(f"y: expected 0, 1 or a torch.Tensor of labels, got {type(y).__name__}")
    if y not in (0, 1):
        raise ValueError(f"y: got {y!r}, expected 0, 1 or a tensor of labels")
    return bool(y)


def _class(logits: Tensor, c: int) -> int:
    if not isinstance(c, int) or not -logits.size(-1) <= c < logits.size(-1):
        raise ValueError(f"y: got class {c!r}, expected one of the {logits.size(-1)} of logits {tuple(logits.shape)}")
    return c
