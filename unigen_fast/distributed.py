"""Losses whose samples, or whose minibatch, are spread over the processes of a `torch.distributed` group.

Each process calls the function with its own shard, along `dim` or of the minibatch. Shards may differ in size, and may
be empty; everything else, options and `requires_grad` included, is the same everywhere.

A result that one process alone would have once is the same on every process, and each calls backward from it once: the
gradient of a shard is then what one process would find for these elements. Summed over the processes, as by
`all_reduce`, parameters' gradients are those of one process; `DistributedDataParallel` averages them, so the loss wants
a factor of the number of processes. Where results are rows of the shard (`importance_weights`, `total_correlation`),
each process goes backward from its own rows. First derivatives only; not for `torch.compile`.

Whatever one process raises, all of them raise, and name it; so they do where processes differ in an option or in the
call they are at. They are in step again then, and the group goes on. What a process raises when the others already have
its numbers, they raise in their next call. Over gloo, a process that is missing is named within the group's timeout;
that group cannot go on. The check is made on the host: on a GPU, one synchronisation a call.
"""

import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

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

HEADER = 1000  # bytes that say what a process brings, or what it raised
INLINE = 128  # numbers that go with it; more need a second collective
_PAUSE = 0.25  # seconds between two looks at whether another process has given up
_ANSWER = 5.0  # seconds before the group's time is up in which the processes say that they are there

_P = ParamSpec("_P")
_R = TypeVar("_R")


# ---- the exchange ----------------------------------------------------------------------------------------------------


class _Brought(NamedTuple):
    """What a process brings: `kind` is the same everywhere, `samples` its own."""

    kind: dict[str, Any]
    samples: int
    numbers: Tensor


@dataclass
class _State:
    """Of a group, on this process."""

    calls: int = 0  # exchanges begun
    raised: str = ""  # by the call before, perhaps on this process alone
    failure: str = ""  # of the connection: there is no next call


_states: "WeakKeyDictionary[dist.ProcessGroup, _State]" = WeakKeyDictionary()


def _process_group(group: Group) -> "dist.ProcessGroup":
    found = group if group is not None else dist.group.WORLD
    assert found is not None
    return found


def _state(group: Group) -> _State:
    return _states.setdefault(_process_group(group), _State())


def _members(group: Group) -> list[int]:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("unigen_fast.distributed: torch.distributed has no process group, call init_process_group")
    members = dist.get_process_group_ranks(_process_group(group))
    if dist.get_rank() not in members:
        raise ValueError(f"group: got one of ranks {members}, expected one that rank {dist.get_rank()} is in")
    return members


def _wire(group: Group) -> torch.device:
    """Where the group's tensors are."""
    on_gpu = "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _text(error: Exception) -> str:
    """As it can travel."""
    return f"{type(error).__name__}: {error}".replace("\0", "").encode(errors="replace").decode()


def _missing(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks) + " did not take part" if ranks else ""


@contextmanager
def _told_in_the_next_call(group: Group) -> Iterator[None]:
    """What is raised after the exchange, the other processes do not know yet."""
    _members(group)
    try:
        yield
    except Exception as error:
        _state(group).raised = _text(error)
        raise


def _together(function: Callable[_P, _R]) -> Callable[_P, _R]:
    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _told_in_the_next_call(kwargs.get("group")):  # type: ignore[arg-type]
            return function(*args, **kwargs)

    return wrapped


def _collective(name: str, group: Group, start: Callable[[], Any]) -> None:
    """Waits for what `start` begins, until it is done, another process gives up, or the group's time is nearly up."""
    state, wire, begun = _state(group), _wire(group), time.monotonic()
    store = _process_group(group).get_group_store()
    limit = _process_group(group)._get_backend(wire).options._timeout.total_seconds()
    work = None
    try:
        work = start()
        while wire.type == "cpu" and not work.is_completed():
            try:
                work.wait(timedelta(seconds=_PAUSE))
            except RuntimeError:
                late = time.monotonic() > begun + limit - min(_ANSWER, limit / 2)
                if not work.is_completed() and (late or store.check(["unigen_fast/failed"])):
                    raise
        work.wait()
    except Exception as error:
        state.failure = _failure(group, begun + limit, f"call {state.calls}", "" if work is not None else _text(error))
        raise RuntimeError(f"{name}: {state.failure}: {error}") from error


def _failure(group: Group, end: float, call: str, own: str) -> str:
    """Why a collective failed, the same on every process: each leaves its word, the first to have waited for those of
    the others says who is missing."""
    members, me = _members(group), dist.get_rank()
    silent = [rank for rank in members if rank != me]
    store = _process_group(group).get_group_store()
    try:
        store.set(f"unigen_fast/rank {me}", own or "here")
        store.set("unigen_fast/failed", "yes")
        while True:
            closed = {rank: _is_closed(rank, group) for rank in silent}  # first: one leaves its word, then ends
            silent = [rank for rank in silent if not store.check([f"unigen_fast/rank {rank}"])]
            if all(closed[rank] for rank in silent) or time.monotonic() > end:
                break
            time.sleep(_PAUSE)
        words = {rank: store.get(f"unigen_fast/rank {rank}").decode() for rank in members if rank not in silent}
        raised = [f"rank {rank} raised {word}" for rank, word in words.items() if word != "here"]
        why = "; ".join(raised) or _missing(silent) or "the connection failed between ranks that are all there"
        return store.compare_set("unigen_fast/failure", "", f"{why} in {call} of ranks {members}").decode()
    except RuntimeError:  # the store has gone with the process that keeps it
        silent = [rank for rank in members if rank != me and _is_closed(rank, group)]
        time.sleep(4 * _PAUSE)  # all look before one ends, which closes its connections as well
        return f"{_missing(silent) or 'the store of torch.distributed failed'} in {call} of ranks {members}"


def _is_closed(rank: int, group: Group) -> bool:
    """Whether the connection is, as where a process has died; one that is only late would get these bytes."""
    if _wire(group).type != "cpu":
        return False
    try:
        dist.isend(torch.zeros(1), rank, group=group, tag=HEADER)
    except RuntimeError:
        return True
    return False


def _gather(name: str, group: Group, numbers: Callable[[], Tensor]) -> Tensor:
    """`[processes, …]` of a tensor of one shape everywhere."""
    found: list[Tensor] = []

    def start() -> Any:
        own = numbers()
        found.append(torch.empty((len(_members(group)), *own.shape), dtype=own.dtype, device=own.device))
        return dist.all_gather(list(found[0].unbind(0)), own, group=group, async_op=True)

    _collective(name, group, start)
    return found[0]


def _differences(members: Sequence[int], kinds: Sequence[dict[str, Any]]) -> str:
    """Each option that is not the same everywhere, with the processes on which it is not that of most."""
    found = []
    for option in dict.fromkeys(option for kind in kinds for option in kind):
        values = [json.dumps(kind.get(option, "missing")) for kind in kinds]
        (most, count), *others = Counter(values).most_common()
        if others and 2 * count <= len(values):
            given = [f"{value} on rank {rank}" for rank, value in zip(members, values, strict=True)]
            found.append(f"{option} " + ", ".join(given))
        elif others:
            odd = [f"{value} on rank {rank}" for rank, value in zip(members, values, strict=True) if value != most]
            found.append(f"{option} {', '.join(odd)}, {most} on the others")
    return "; ".join(found)


def _handshake(name: str, group: Group, bring: Callable[[], _Brought]) -> tuple[_Brought, list[dict[str, Any]], Tensor]:
    """What this process brings, the headers of all, and the numbers that go with them.

    One collective of a fixed size, whatever is wrong on a process: a header in JSON, what it raised, and its numbers if
    they are at most INLINE.
    """
    members, wire, state = _members(group), _wire(group), _state(group)
    if state.failure:
        raise RuntimeError(f"{name}: got a group that cannot go on, expected a new one: {state.failure}")
    state.calls += 1
    before, state.raised = state.raised, ""
    brought, own = None, None
    step = {"call": state.calls, "function": name}
    message = torch.zeros(HEADER + 8 * INLINE, dtype=torch.uint8)
    try:
        brought = bring()
        size = brought.numbers.numel()
        given = {"step": step, "kind": brought.kind, "samples": brought.samples, "size": size, "before": bool(before)}
        header = json.dumps(given).encode()
        if len(header) >= HEADER:
            raise ValueError(f"{name}: got options of {len(header)} bytes, expected fewer than {HEADER}")
        if size <= INLINE:
            message[HEADER:].view(torch.float64)[:size] = brought.numbers.detach().flatten()
    except Exception as error:
        own = error
        header, before = json.dumps({"step": step, "now": True}).encode(), _text(error)
    text = header + b"\0" + before.encode()
    message[:HEADER] = torch.frombuffer(bytearray(text[:HEADER].ljust(HEADER, b"\0")), dtype=torch.uint8)
    received = _gather(name, group, lambda: message.to(wire)).cpu()
    parts = [bytes(row.tolist()).split(b"\0") for row in received[:, :HEADER]]
    headers = [json.loads(part[0]) for part in parts]
    texts = {rank: part[1].decode(errors="ignore") for rank, part in zip(members, parts, strict=True)}
    state.calls = max(header["step"]["call"] for header in headers)  # in step again, whatever is raised

    now = [rank for rank, header in zip(members, headers, strict=True) if "now" in header]
    if own is not None:
        try:
            raise own
        finally:
            del own  # a cycle through its traceback would keep this frame's tensors
    if now:
        bad_input = all(texts[rank].startswith(("TypeError", "ValueError")) for rank in now)
        found = f"{name}: " + "; ".join(f"on rank {rank}, {texts[rank]}" for rank in now)
        raise ValueError(found) if bad_input else RuntimeError(found)
    failed = [rank for rank, header in zip(members, headers, strict=True) if header["before"]]
    if 0 < len(failed) < len(members):
        found = "; ".join(f"rank {rank} raised {texts[rank]}" for rank in failed)
        raise RuntimeError(f"{name}: the call before gave the other ranks a value, but {found}")
    if steps := _differences(members, [header["step"] for header in headers]):
        raise RuntimeError(f"{name}: expected every rank at the same call, got {steps}")
    if kinds := _differences(members, [header["kind"] for header in headers]):
        raise ValueError(f"{name}: expected the same on every rank but for the size of the shard, got {kinds}")
    assert brought is not None
    return brought, headers, received[:, HEADER:].contiguous().view(torch.float64)


def _exchange(name: str, group: Group, bring: Callable[[], _Brought]) -> tuple[list[int], list[Tensor]]:
    """Each process's samples and numbers, from `bring`, in float64; what it raises on one is raised on all of them."""
    brought, headers, every = _handshake(name, group, bring)
    sizes = [header["size"] for header in headers]
    if max(sizes) > INLINE:

        def padded() -> Tensor:
            numbers = brought.numbers.detach().flatten().to(_wire(group), torch.float64)
            return F.pad(numbers, (0, max(sizes) - numbers.numel()))

        every = _gather(name, group, padded)
    device = brought.numbers.device
    return [header["samples"] for header in headers], [
        x[:size].to(device) for x, size in zip(every, sizes, strict=True)
    ]


def _sum(name: str, group: Group, call: int, part: Callable[[], Tensor]) -> Tensor:
    """Over the processes, in the backward of a call; of one shape everywhere."""

    def bring() -> _Brought:
        _first_derivative()
        return _Brought({"backward of call": call}, 0, part())

    brought, _, every = _handshake(f"{name}, backward", group, bring)
    x = brought.numbers
    if x.numel() <= INLINE:
        return every[:, : x.numel()].sum(0).view(x.shape).to(x.device, x.dtype)
    on_wire: list[Tensor] = []

    def start() -> Any:
        on_wire.append(x.to(_wire(group), copy=True, memory_format=torch.contiguous_format))
        return dist.all_reduce(on_wire[0], group=group, async_op=True)

    _collective(f"{name}, backward", group, start)
    return on_wire[0].to(x.device)


def _kind(*tensors: Tensor, **options: Any) -> dict[str, Any]:
    gradients = [x.requires_grad and torch.is_grad_enabled() for x in tensors]
    return {"dtype": str(tensors[0].dtype).removeprefix("torch."), "requires_grad": gradients, **options}


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [size for d, size in enumerate(shape) if d != dim]


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
        ctx.call = _state(group).calls
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        with _told_in_the_next_call(ctx.group):

            def part() -> Tensor:
                return (grad * ctx.saved_tensors[0]).double().sum(ctx.dim, keepdim=True)

            sums = _sum("importance_weights", ctx.group, ctx.call, part)
            return (ctx.saved_tensors[0] * (grad - sums) / ctx.temperature).to(ctx.dtype), None, None, None, None


# ---- importance ------------------------------------------------------------------------------------------------------


def _log_sum_exp(
    name: str, log_w: Tensor, dim: int, group: Group, temperature: float = 1.0, detach: bool = False
) -> tuple[Tensor, Tensor, int, int]:
    """(the shard over the temperature, in float64; log of the sum over all, `dim` kept; samples; dim)."""

    def bring() -> _Brought:
        number = _checks.number("temperature", temperature, minimum=0.0, exclusive=True)
        _checks.floating("log_w", log_w)
        kept = _checks.dimension("dim", log_w, dim)
        statistics = _statistics(log_w.detach().double() / temperature, kept)
        options = {"dim": kept, "temperature": number, "detach": bool(detach)}
        kind = _kind(log_w, shape=_without(log_w.shape, kept), **options)
        return _Brought(kind, log_w.size(kept), torch.stack([s.flatten().cpu() for s in statistics]))

    counts, numbers = _exchange(name, group, bring)
    if sum(counts) == 0:
        raise ValueError(f"log_w: dimension {dim} holds no samples on any rank, expected at least one")
    kept = dim % log_w.dim()
    shifts, totals = torch.stack([x.view(2, -1) for x in numbers]).unbind(1)
    (found,) = _joined(shifts, totals)
    of_rows = [1 if d == kept else size for d, size in enumerate(log_w.shape)]
    return log_w.detach().double() / temperature, found.view(of_rows).to(log_w.device), sum(counts), kept


@_together
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
            dimensions, dtype, options or `requires_grad` are not those of the others.
        RuntimeError: no process group; another rank raised something else, is at another call, or did not come in the
            group's time.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders" (2016), Eq. 8.
    """
    x, found, count, dim = _log_sum_exp("log_mean_exp", log_w, dim, group)
    value = (found - math.log(count)).to(upcast(log_w).dtype)
    if log_w.requires_grad:
        slope = torch.where(found == -math.inf, 0.0, (x - found).exp()).to(value.dtype)
        value = _Given.apply(log_w, value, slope)
    return value.squeeze(dim)


@_together
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
    x, found, _, dim = _log_sum_exp("importance_weights", log_w, dim, group, temperature, detach)
    weights = torch.where(found == -math.inf, 0.0, (x - found).exp()).to(upcast(log_w).dtype)
    return weights if detach or not log_w.requires_grad else _Weights.apply(log_w, weights, dim, temperature, group)


# ---- adversarial -----------------------------------------------------------------------------------------------------


@_together
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
        number = _checks.number("temperature", temperature, minimum=0.0, exclusive=True)
        _checks.floating("fake", fake)
        options = {"temperature": number, "detach": bool(detach), "reduction": reduction, "groups": groups is not None}
        if groups is not None:
            labels = adversarial._labels_of(fake, groups, dim, reduction)
            numbers = _terms_of_labels(fake.detach().reshape(-1), labels, temperature)
            return _Brought(_kind(fake, **options), fake.numel(), numbers)
        if dim is None:
            terms = _terms(fake.detach().reshape(-1), 0, temperature)
            return _Brought(_kind(fake, **options), fake.numel(), terms)
        kept = _checks.dimension("dim", fake, dim)
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
    wide = logits.double()
    shift, total = _statistics(wide / temperature, dim)
    terms = (wide / temperature - torch.where(shift == -math.inf, 0.0, shift).to(logits.device)).exp()
    weighted = torch.where(terms == 0, 0.0, terms * F.softplus(-wide)).sum(dim, keepdim=True)
    return torch.stack([x.flatten().cpu() for x in (shift, total, weighted)])


def _terms_of_labels(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`[4, labels]`: each label, its bits those of a float64, and the terms of its samples."""
    known, places = labels.unique(return_inverse=True)
    wide = logits.double()
    scaled = wide / temperature
    shift = scaled.new_full(known.shape, -math.inf).scatter_reduce(0, places, scaled, "amax")
    terms = (scaled - torch.where(shift == -math.inf, 0.0, shift)[places]).exp()
    total, weighted = (
        terms.new_zeros(known.shape).index_add(0, places, x)
        for x in (terms, torch.where(terms == 0, 0.0, terms * F.softplus(-wide)))
    )
    return torch.stack([x.cpu() for x in (known.view(torch.float64), shift, total, weighted)])


# ---- divergences over pairs ------------------------------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    """The points of all processes below one another; backward keeps those of this one, `summed` over the processes
    where each goes backward from rows of its own."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, every: Tensor, first: int, name: str, summed: bool, group: Group) -> Tensor:
        ctx.rows, ctx.name, ctx.summed, ctx.group = (first, shard.size(0)), name, summed, group
        ctx.call = _state(group).calls
        return every.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _told_in_the_next_call(ctx.group):
            if ctx.summed:
                grad = _sum(ctx.name, ctx.group, ctx.call, lambda: grad)
            else:
                _first_derivative()
            return grad.narrow(0, *ctx.rows), None, None, None, None, None


def _gathered(
    name: str, group: Group, check: Callable[[], tuple[Sequence[Tensor], dict[str, Any]]], summed: bool
) -> tuple[list[Tensor], int, list[int]]:
    """Matrices of all processes' points, those of this one with gradients; its first row and the rows of each.

    `check` gives the matrices and the options."""
    given: list[Tensor] = []

    def bring() -> _Brought:
        matrices, options = check()
        given.extend(matrices)
        kind = _kind(*given, cols=given[0].size(1), **options)
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


@_together
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

    def check() -> tuple[Sequence[Tensor], dict[str, Any]]:
        matrices = divergence._check_posteriors(z, mean, logvar, dataset_size, estimator)
        return matrices, {"dataset_size": dataset_size, "estimator": estimator}

    every, first, rows = _gathered("total_correlation", group, check, True)
    me = _members(group).index(dist.get_rank())
    found = divergence.total_correlation(*every, dataset_size=dataset_size, estimator=estimator)
    return TotalCorrelation(*(x.narrow(0, first, rows[me]) for x in found))


@_together
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

    def check() -> tuple[Sequence[Tensor], dict[str, Any]]:
        *matrices, numbers = divergence._check_points(x, y, kernel, scales)
        return matrices, {"kernel": kernel, "scales": numbers, "unbiased": bool(unbiased)}

    (every_x, every_y), *_ = _gathered("mmd", group, check, False)
    return divergence.mmd(every_x, every_y, kernel=kernel, scales=scales, unbiased=unbiased)
