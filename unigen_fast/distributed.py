"""Losses whose samples, or whose minibatch, are spread over the processes of a `torch.distributed` group.

Each process calls the function with its own shard, along `dim` or of the minibatch. Shards may differ in size, and may
be empty; everything else, options included, is the same everywhere.

A result that one process alone would have once is the same on every process, and each calls backward from it once: the
gradient of a shard is then what one process would find for these elements. Summed over the processes, as by
`all_reduce`, parameters' gradients are those of one process; `DistributedDataParallel` averages them, so the loss wants
a factor of the number of processes. Where results are rows of the shard (`importance_weights`, `total_correlation`),
each process goes backward from its own rows. First derivatives only; not for `torch.compile`.

Bad input on one process raises on all of them, and names it. Who does not come is named when the group's time is up.
The check is made on the host: on a GPU, one synchronisation a call.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from unigen_fast import _checks, adversarial, divergence
from unigen_fast.divergence import TotalCorrelation
from unigen_fast.reference._common import upcast
from unigen_fast.reference.importance import row_statistics

__all__ = ["importance_weighted_generator_loss", "importance_weights", "log_mean_exp", "mmd", "total_correlation"]

Group: TypeAlias = "dist.ProcessGroup | None"

HEADER = 2048  # bytes that say what a process brings
INLINE = 128  # numbers that go with it; more need a second collective
_ANSWER = timedelta(seconds=5)  # for the others' word, once the group's own time is up


# ---- the exchange ----------------------------------------------------------------------------------------------------


class _Brought(NamedTuple):
    """What a process brings: `kind` is the same everywhere, `samples` its own; `numbers` in float64."""

    kind: dict[str, Any]
    samples: int
    numbers: Tensor


_exchanges: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def _members(group: Group) -> list[int]:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("unigen_fast.distributed: torch.distributed has no process group, call init_process_group")
    members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    if dist.get_rank() not in members:
        raise ValueError(f"group: got one of ranks {members}, expected one that rank {dist.get_rank()} is in")
    return members


@contextmanager
def _naming_who_is_missing(name: str, group: Group) -> Iterator[None]:
    """A collective that fails here fails everywhere: each process leaves its word, and misses that of the others."""
    members = _members(group)
    turn = next(_exchanges[f"{members}"])
    try:
        yield
    except RuntimeError as error:
        store = dist.distributed_c10d._get_default_store()
        key = f"unigen_fast/{members}/{turn}/"
        store.set(f"{key}{dist.get_rank()}", "here")
        missing = []
        for rank in members:
            try:
                store.wait([f"{key}{rank}"], _ANSWER)
            except RuntimeError:
                missing.append(rank)
        who = ", ".join(f"rank {rank}" for rank in missing) or "no rank, but the connection failed"
        raise RuntimeError(f"{name}: {who} did not take part in a collective of ranks {members}: {error}") from error


def _gather(numbers: Tensor, group: Group) -> Tensor:
    """`[processes, …]` of a tensor of one shape everywhere."""
    count = len(_members(group))
    found = torch.empty((count, *numbers.shape), dtype=numbers.dtype, device=numbers.device)
    dist.all_gather_into_tensor(found.flatten(0, 1) if numbers.dim() else found, numbers, group=group)
    return found


def _wire(group: Group) -> torch.device:
    """Where the group's tensors are."""
    on_gpu = "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _exchange(name: str, group: Group, bring: Callable[[], _Brought]) -> tuple[list[int], list[Tensor]]:
    """Each process's samples and numbers, from `bring`; what it raises on one process is raised on all of them.

    One collective of a fixed size, whatever is wrong with a shape; a second one where a process has more numbers than
    INLINE.
    """
    members, wire = _members(group), _wire(group)
    brought, own = None, None
    try:
        brought = bring()
        header = {
            "kind": {"function": name, **brought.kind},
            "samples": brought.samples,
            "size": brought.numbers.numel(),
        }
    except (TypeError, ValueError) as error:
        own, header = error, {"error": f"{type(error).__name__}: {error}"[: HEADER // 5]}
    numbers = brought.numbers.detach().flatten().to(wire, torch.float64) if brought else torch.empty(0, device=wire)
    text = json.dumps(header, ensure_ascii=False).encode()
    message = torch.zeros(HEADER + 8 * INLINE, dtype=torch.uint8)
    message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    message = message.to(wire)
    if numbers.numel() <= INLINE:
        message[HEADER:].view(torch.float64)[: numbers.numel()] = numbers
    with _naming_who_is_missing(name, group):
        received = _gather(message, group)
    headers = [json.loads(bytes(row[row != 0].tolist())) for row in received[:, :HEADER].cpu()]
    failed = {rank: h["error"] for rank, h in zip(members, headers, strict=True) if "error" in h}
    if failed:
        if own is not None:
            raise own
        raise ValueError(f"{name}: " + "; ".join(f"on rank {rank}, {error}" for rank, error in failed.items()))
    kinds = [h["kind"] for h in headers]
    if any(kind != kinds[0] for kind in kinds):
        given = "; ".join(f"rank {rank}: {kind}" for rank, kind in zip(members, kinds, strict=True))
        raise ValueError(f"{name}: expected the same on every rank but for the size of the shard, got {given}")
    sizes = [h["size"] for h in headers]
    if max(sizes) <= INLINE:
        every = received[:, HEADER:].contiguous().view(torch.float64)
    else:
        with _naming_who_is_missing(name, group):
            every = _gather(F.pad(numbers, (0, max(sizes) - numbers.numel())), group)
    assert brought is not None
    device = brought.numbers.device
    return [h["samples"] for h in headers], [x[:size].to(device) for x, size in zip(every, sizes, strict=True)]


def _kind(x: Tensor, **options: Any) -> dict[str, Any]:
    return {"dtype": str(x.dtype).removeprefix("torch."), **options}


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [size for d, size in enumerate(shape) if d != dim]


def _dimension(name: str, x: Tensor, dim: int) -> int:
    """As `_checks.sample_dimension`, but a shard may be empty."""
    _checks.floating(name, x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: got {dim} for {name} of shape {tuple(x.shape)}")
    return dim % x.dim()


# ---- what is known of all shards -------------------------------------------------------------------------------------


def _statistics(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(shift, sum of e^(x - shift)) in float64, with `dim` kept; -inf and 0 of nothing."""
    if x.size(dim) == 0:
        shape = [1 if d == dim else size for d, size in enumerate(x.shape)]
        return torch.full(shape, -math.inf, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    shift, total = (s.double() for s in row_statistics(x.double(), dim))
    return torch.where(total == 0, -math.inf, shift), total


def _joined(shifts: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
    """log sum over the processes, dimension 0, of the first of the sums; and each other over it."""
    top = shifts.amax(0)
    base = torch.where(top == -math.inf, 0.0, top)
    shares = (shifts - base).exp()
    total, *others = (torch.where(part == 0, 0.0, part * shares).sum(0) for part in sums)
    return base + total.log(), *(torch.where(total == 0, 0.0, other / total) for other in others)


def _first_derivative() -> None:
    """A second one would take the first for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("unigen_fast.distributed: got create_graph=True, expected first derivatives only")


class _Given(torch.autograd.Function):
    """A value of the whole with the slope of each element of the shard."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = shard.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _first_derivative()
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(ctx.dtype), None, None


class _Weights(torch.autograd.Function):
    """The shard's weights; backward sums the weighted upstream gradients over the processes."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, weights: Tensor, dim: int, temperature: float, group: Group) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.dim, ctx.temperature, ctx.group, ctx.dtype = dim, temperature, group, shard.dtype
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        _first_derivative()
        (weights,) = ctx.saved_tensors
        sums = (grad * weights).double().sum(ctx.dim, keepdim=True)
        _sum("importance_weights, backward", sums, ctx.group)
        return (weights * (grad - sums) / ctx.temperature).to(ctx.dtype), None, None, None, None


def _sum(name: str, x: Tensor, group: Group) -> None:
    """Over the processes, in place."""
    on_wire = x.to(_wire(group)).contiguous()
    with _naming_who_is_missing(name, group):
        dist.all_reduce(on_wire, group=group)
    x.copy_(on_wire)


# ---- importance ------------------------------------------------------------------------------------------------------


def _log_sum_exp(name: str, log_w: Tensor, dim: int, group: Group, **options: float) -> tuple[Tensor, Tensor, int, int]:
    """(the shard over the temperature, in float64; log of the sum over all, `dim` kept; samples; dim)."""
    temperature = options.get("temperature", 1.0)

    def bring() -> _Brought:
        _checks.number("temperature", temperature, minimum=0.0, exclusive=True)
        kept = _dimension("log_w", log_w, dim)
        statistics = _statistics(log_w.detach() / temperature, kept)
        kind = _kind(log_w, shape=_without(log_w.shape, kept), dim=kept, **options)
        return _Brought(kind, log_w.size(kept), torch.stack([s.flatten().cpu() for s in statistics]))

    counts, numbers = _exchange(name, group, bring)
    if sum(counts) == 0:
        raise ValueError(f"log_w: dimension {dim} holds no samples on any rank, expected at least one")
    kept = dim % log_w.dim()
    shifts, totals = torch.stack([x.view(2, -1) for x in numbers]).unbind(1)
    (found,) = _joined(shifts, totals)
    of_rows = [1 if d == kept else size for d, size in enumerate(log_w.shape)]
    return log_w.detach().double() / temperature, found.view(of_rows).to(log_w.device), sum(counts), kept


def log_mean_exp(log_w: Tensor, *, dim: int, group: Group = None) -> Tensor:
    """`unigen_fast.log_mean_exp` of the K samples of all processes.

    (maximum, sum of exponentials) of each row goes to every process, whatever K: forward takes one collective (two for
    more than 64 rows), backward none.

    Args:
        log_w: this process's samples along `dim`, any number of them.
        dim: the dimension of the samples.
        group: of processes; None: the default group.

    Returns:
        Shape of `log_w` without `dim`, the same on every process.

    Raises:
        TypeError, ValueError: as `unigen_fast.log_mean_exp`, on all processes; no samples at all; a rank's other
            dimensions or dtype are not those of the others.
        RuntimeError: no process group; a rank did not come in the group's time.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders" (2016), Eq. 8.
    """
    x, found, count, dim = _log_sum_exp("log_mean_exp", log_w, dim, group)
    value = (found - math.log(count)).to(upcast(log_w).dtype)
    if log_w.requires_grad:
        slope = torch.where(found == -math.inf, 0.0, (x - found).exp()).to(value.dtype)
        value = _Given.apply(log_w, value, slope)
    return value.squeeze(dim)


def importance_weights(
    log_w: Tensor, *, dim: int, temperature: float = 1.0, detach: bool = True, group: Group = None
) -> Tensor:
    """`unigen_fast.importance_weights`, normalised over the samples of all processes: over all shards they sum to 1.

    What travels is what `log_mean_exp` sends; backward, with `detach=False`, takes one collective of a number a row.

    Args: as `unigen_fast.importance_weights`; `log_w` holds this process's samples; `group` of processes, None: the
        default group.

    Returns:
        Shape of `log_w`: the weights of this process's samples.

    Raises: as `log_mean_exp`.

    Source: Hu et al., "On Unifying Deep Generative Models" (2018), Eq. 16, w~_i.
    """
    x, found, _, dim = _log_sum_exp("importance_weights", log_w, dim, group, temperature=temperature)
    weights = torch.where(found == -math.inf, 0.0, (x - found).exp()).to(log_w.dtype)
    return weights if detach or not log_w.requires_grad else _Weights.apply(log_w, weights, dim, temperature, group)


# ---- adversarial -----------------------------------------------------------------------------------------------------


def importance_weighted_generator_loss(
    *,
    fake: Tensor,
    dim: int | None = None,
    groups: Tensor | None = None,
    temperature: float = 1.0,
    detach: bool = True,
    reduction: str = "mean",
    group: Group = None,
) -> Tensor:
    """`unigen_fast.importance_weighted_generator_loss` with the k of the paper: the minibatch of all processes.

    Three numbers a group of samples go to every process, four with `groups`, which may have other labels on every
    process: forward takes one collective (two for more than 42 groups, or 32 labels), backward none.

    Args: as `unigen_fast.importance_weighted_generator_loss`; `fake` holds this process's samples (of `dim`, where
        given), `groups` their labels; `group` of processes, None: the default group.

    Returns:
        As there, the same on every process.

    Raises: as there, and as `log_mean_exp`.

    Source: Hu et al. (2018), Eq. 16.
    """
    name = "importance_weighted_generator_loss"

    def bring() -> _Brought:
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.number("temperature", temperature, minimum=0.0, exclusive=True)
        _checks.floating("fake", fake)
        options = {"temperature": temperature, "detach": detach, "reduction": reduction, "groups": groups is not None}
        if groups is not None:
            labels = adversarial._labels_of(fake, groups, dim, reduction)
            known = labels.unique()
            rows = [_terms(fake.detach().reshape(-1)[labels == label], 0, temperature) for label in known]
            terms = torch.cat(rows, 1) if rows else torch.empty(3, 0, dtype=torch.float64)
            numbers = torch.cat([known.cpu().view(torch.float64)[None], terms])
            return _Brought(_kind(fake, **options), fake.numel(), numbers)
        if dim is None:
            terms = _terms(fake.detach().reshape(-1), 0, temperature)
            return _Brought(_kind(fake, **options), fake.numel(), terms)
        kept = _dimension("fake", fake, dim)
        kind = _kind(fake, shape=_without(fake.shape, kept), dim=kept, **options)
        return _Brought(kind, fake.size(kept), _terms(fake.detach(), kept, temperature))

    counts, numbers = _exchange(name, group, bring)
    logits, where = fake.detach().double(), 0
    if groups is not None:
        of_ranks = [x.view(4, -1) for x in numbers]
        known = [x[0].contiguous().view(torch.int64) for x in of_ranks]
        every = torch.cat(known).unique()
        dense = torch.zeros(3, len(numbers), len(every), dtype=torch.float64)
        dense[0] = -math.inf
        for rank, (labels, x) in enumerate(zip(known, of_ranks, strict=True)):
            dense[:, rank, torch.searchsorted(every, labels)] = x[1:]
        log_sum, loss = (x.to(fake.device) for x in _joined(*dense))
        places = torch.searchsorted(every, groups.to("cpu", torch.int64)).to(fake.device)
        of_element, loss_of_element = (x[places].view(fake.shape) for x in (log_sum, loss))
    else:
        if dim is not None and sum(counts) == 0:
            raise ValueError(f"fake: dimension {dim} holds no samples on any rank, expected at least one")
        log_sum, loss = (x.to(fake.device) for x in _joined(*torch.stack([x.view(3, -1) for x in numbers], 1)))
        if dim is None:
            loss = loss[: 1 if sum(counts) else 0]  # no samples, no group
            of_element, loss_of_element = log_sum, loss
        else:
            where = dim % fake.dim()
            of_rows = [1 if d == where else size for d, size in enumerate(fake.shape)]
            of_element, loss_of_element = log_sum.view(of_rows), loss.view(of_rows)
    value = loss.sum() if reduction == "sum" else loss.mean() if reduction == "mean" else loss
    if reduction == "none":
        value = value.view(_without(fake.shape, where)) if dim is not None else value.sum()
    value = value.to(upcast(fake).dtype)
    if not fake.requires_grad:
        return value
    weights = torch.where(of_element == -math.inf, 0.0, (logits / temperature - of_element).exp())
    slope = -torch.sigmoid(-logits)
    if not detach:
        slope = slope + (F.softplus(-logits) - loss_of_element) / temperature
    slope = torch.where(weights == 0, 0.0, weights * slope)
    if reduction == "mean":
        slope = slope / loss.numel()
    if reduction == "none" and dim is not None:
        return _Given.apply(fake, value.unsqueeze(where), slope.to(value.dtype)).squeeze(where)
    return _Given.apply(fake, value, slope.to(value.dtype).view(fake.shape))


def _terms(logits: Tensor, dim: int, temperature: float) -> Tensor:
    """`[3, rows]`: the shift, and sums over `dim` of e^(l / T - shift), alone and times softplus(-l)."""
    shift, total = _statistics(logits / temperature, dim)
    wide = logits.double()
    terms = (wide / temperature - torch.where(shift == -math.inf, 0.0, shift).to(logits.device)).exp()
    weighted = torch.where(terms == 0, 0.0, terms * F.softplus(-wide)).sum(dim, keepdim=True)
    return torch.stack([x.flatten().cpu() for x in (shift, total, weighted)])


# ---- divergences over pairs ------------------------------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    """The points of all processes below one another; backward keeps those of this one, `summed` over the processes
    where each goes backward from rows of its own."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, every: Tensor, first: int, name: str, summed: bool, group: Group) -> Tensor:
        ctx.rows, ctx.name, ctx.summed, ctx.group = (first, shard.size(0)), name, summed, group
        return every.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _first_derivative()
        if ctx.summed:
            grad = grad.clone()
            _sum(f"{ctx.name}, backward", grad, ctx.group)
        return grad.narrow(0, *ctx.rows), None, None, None, None, None


def _gathered(
    name: str, group: Group, check: Callable[[], Sequence[Tensor]], summed: bool, **options: Any
) -> tuple[list[Tensor], int, list[int]]:
    """Matrices of all processes' points, those of this one with gradients; its first row and the rows of each."""
    given: list[Tensor] = []

    def bring() -> _Brought:
        given.extend(check())
        kind = _kind(given[0], cols=given[0].size(1), matrices=len(given), **options)
        sizes = torch.tensor([float(x.size(0)) for x in given], dtype=torch.float64)
        points = [x.detach().double().flatten().cpu() for x in given]
        return _Brought(kind, given[0].size(0), torch.cat([sizes, *points]))

    _, numbers = _exchange(name, group, bring)
    cols, me = given[0].size(1), _members(group).index(dist.get_rank())
    rows = [[int(n) for n in x[: len(given)].tolist()] for x in numbers]
    parts = [x[len(given) :].split([n * cols for n in of]) for x, of in zip(numbers, rows, strict=True)]
    found = []
    for place, x in enumerate(given):
        every = torch.cat([part[place].view(-1, cols) for part in parts]).to(x.device, x.dtype)
        first = sum(of[place] for of in rows[:me])
        found.append(_Gathered.apply(x, every, first, name, summed, group))
    return found, sum(of[0] for of in rows[:me]), [of[0] for of in rows]


def total_correlation(
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int,
    estimator: str = "mss",
    group: Group = None,
) -> TotalCorrelation:
    """`unigen_fast.total_correlation` over the minibatch of all processes.

    Every pair of examples counts, so every process needs all of z, mean and logvar: 3 B D numbers forward, and in
    backward one sum over the processes of B D for each that wants a gradient. Each process computes all pairs.

    Args: as `unigen_fast.total_correlation`, with this process's examples, `[B_r, D]`; the order of the minibatch is
        that of the ranks. `group` of processes, None: the default group.

    Returns:
        Six rows `[B_r]`, those of this process's examples. Their sum over all processes, over B, is the mean.

    Raises: as there, and as `log_mean_exp`.

    Source: Chen et al., "Isolating Sources of Disentanglement in VAEs" (2018), Eq. 2 and App. C.
    """

    def check() -> Sequence[Tensor]:
        return divergence._check_posteriors(z, mean, logvar, dataset_size, estimator)

    wanted = [x.requires_grad for x in (z, mean, logvar) if isinstance(x, Tensor)]
    options = {"dataset_size": dataset_size, "estimator": estimator, "gradients": wanted}
    every, first, rows = _gathered("total_correlation", group, check, True, **options)
    me = _members(group).index(dist.get_rank())
    found = divergence.total_correlation(*every, dataset_size=dataset_size, estimator=estimator)
    return TotalCorrelation(*(x.narrow(0, first, rows[me]) for x in found))


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "imq",
    scales: Sequence[float] = divergence.MMD_SCALES,
    unbiased: bool = True,
    group: Group = None,
) -> Tensor:
    """`unigen_fast.mmd` of the points of all processes.

    Every pair counts, so every process needs all points: (N + M) D numbers forward, nothing backward. Each process
    computes all pairs.

    Args: as `unigen_fast.mmd`, with this process's points, `[N_r, D]` and `[M_r, D]`. `group` of processes, None: the
        default group.

    Returns:
        One number, the same on every process.

    Raises: as there, and as `log_mean_exp`.

    Source: Gretton et al., "A Kernel Two-Sample Test" (2012), Lemma 6.
    """

    def check() -> Sequence[Tensor]:
        return divergence._check_points(x, y, kernel, scales)[:2]

    options = {"kernel": kernel, "scales": list(scales), "unbiased": unbiased}
    (every_x, every_y), *_ = _gathered("mmd", group, check, False, **options)
    return divergence.mmd(every_x, every_y, kernel=kernel, scales=scales, unbiased=unbiased)
