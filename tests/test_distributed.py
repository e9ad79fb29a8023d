"""Shards on 2 and 4 processes against the whole on one."""

import math
import multiprocessing
import os
import re
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import unigen_fast as uf

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
SHARDS = {2: ([4, 3], [0, 5]), 4: ([3, 0, 5, 2], [2, 2, 2, 2])}

# ---- processes -------------------------------------------------------------------------------------------------------


def serve(rank: int, count: int, backend: str, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=30))
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(*args)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class Processes:
    """Rank 0 keeps the store, as where nobody else starts one."""

    def __init__(self, count: int, backend: str = "gloo") -> None:
        self.count, self.backend = count, backend
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.started = [], []
        with socket.socket() as free:
            free.bind(("localhost", 0))
            store = f"tcp://localhost:{free.getsockname()[1]}"
        for rank in range(self.count):
            here, there = context.Pipe()
            args = (rank, self.count, self.backend, store, there)
            self.started.append(context.Process(target=serve, args=args, daemon=True))
            self.pipes.append(here)
            self.started[-1].start()
            there.close()

    def attempt(self, job: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """(whether it returned, what it returned or raised) of each process."""
        if not all(process.is_alive() for process in self.started):  # one was killed
            self.close()
            self.start()
        for pipe in self.pipes:
            pipe.send((job, args))
        if not all(pipe.poll(120) for pipe in self.pipes):
            for process in self.started:
                process.kill()
                process.join()
            raise AssertionError("a process hangs")
        return [self.answer(pipe) for pipe in self.pipes]

    @staticmethod
    def answer(pipe: Connection) -> tuple[bool, Any]:
        try:
            return pipe.recv()
        except EOFError:
            return False, "died"

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        found = self.attempt(job, *args)
        assert all(ok for ok, _ in found), next(text for ok, text in found if not ok)
        return [result for _, result in found]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.started, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.started:
            process.join(10)


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    found = Processes(request.param)
    yield found
    found.close()


@pytest.fixture(scope="module")
def processes_with_gpus() -> Iterator[Processes]:
    if torch.cuda.device_count() < 2 or not dist.is_nccl_available():
        pytest.skip("fewer than two GPUs, or no NCCL")
    found = Processes(2, "nccl")
    yield found
    found.close()


# ---- what they do ----------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return x.split(list(sizes), dim)[dist.get_rank()].clone().to(device)


def shard_of(
    name: str, tensors: Sequence[Tensor], labels: Tensor | None, sizes: Sequence[int], dim: int, rows: bool,
    options: dict[str, Any], upstream: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The value, and the gradients of this process's shards; of `rows`, of the shard's part of `upstream`."""
    shards = [own(x, sizes, dim).requires_grad_() for x in tensors]
    if labels is not None:
        options = {**options, "groups": own(labels, sizes)}
    value = call(getattr(uf.distributed, name), shards, options)
    upstream = own(upstream, sizes, dim if value.dim() > 1 else 0) if rows else upstream
    gradients = torch.autograd.grad(value, shards, upstream.to(value)) if value.requires_grad else []
    return value.detach().cpu(), [gradient.cpu() for gradient in gradients]


def call(function: Callable[..., Any], tensors: Sequence[Tensor], options: dict[str, Any]) -> Tensor:
    if function.__name__ == "importance_weighted_generator_loss":
        return function(fake=tensors[0], **options)
    found = function(*tensors, **options)
    if isinstance(found, uf.TotalCorrelation):
        return sum(weight * x for weight, x in zip((1.0, 0.7, -0.4, 0.9, -1.3, 0.6), found, strict=True))
    return found


class Op:
    def __init__(
        self, name: str, shapes: Sequence[tuple[int | str, ...]], dim: int = 0, rows: bool = False,
        labels: bool = False, scale: float = 3.0, lift: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        self.name, self.shapes, self.dim, self.rows, self.labels = name, shapes, dim, rows, labels
        self.scale, self.lift, self.options = scale, lift, options

    def tensors(self, total: int, dtype: torch.dtype) -> list[Tensor]:
        shapes = [[total if n == "n" else n for n in shape] for shape in self.shapes]
        return [(draw(*shape, seed=i, scale=self.scale) + self.lift).to(dtype) for i, shape in enumerate(shapes)]


IW = "importance_weighted_generator_loss"
OPS = [
    Op("log_mean_exp", [("n", 5)], dim=0),
    Op("log_mean_exp", [(70, "n", 2)], dim=1),  # more rows than go with the header
    Op("log_mean_exp", [(4, "n")], dim=-1, scale=300.0),
    Op("importance_weights", [(4, "n")], dim=1, temperature=2.0),
    Op("importance_weights", [(4, "n")], dim=1, rows=True, temperature=0.5, detach=False),
    Op(IW, [("n",)]),
    Op(IW, [("n", 1)], temperature=0.7, detach=False),
    Op(IW, [("n",)], scale=200.0, lift=-900.0),
    *(Op(IW, [(6, "n")], dim=1, reduction=kind) for kind in ("mean", "sum", "none")),
    *(Op(IW, [("n",)], labels=True, reduction=kind, detach=kind == "sum") for kind in ("mean", "sum")),
    *(
        Op("total_correlation", [("n", 3)] * 3, rows=True, scale=0.8, dataset_size=500, estimator=kind)
        for kind in ("mss", "mws", "mss_columns")
    ),
    Op("mmd", [("n", 3), ("n", 3)], kernel="rbf"),
    Op("mmd", [("n", 3), ("n", 3)], kernel="imq", unbiased=False, scales=(0.5, 2.0)),
]


def compare(processes: Processes, op: Op, dtype: torch.dtype) -> None:
    """In float64, of the same inputs: one process's float32 has rounding of its own."""
    for sizes in SHARDS[processes.count]:
        total = sum(sizes)
        plain = op.tensors(total, dtype)
        tensors = [x.double().requires_grad_() for x in plain]
        labels = torch.tensor([(i * i) % 3 * 10 - 7 for i in range(total)]) if op.labels else None
        dim_option = {"dim": op.dim} if op.name in ("log_mean_exp", "importance_weights") or op.dim else {}
        options = {**op.options, **dim_option}
        of_one = options if labels is None else {**options, "groups": labels}
        expected = call(getattr(uf, op.name), tensors, of_one)
        upstream = draw(*expected.shape, seed=9)
        gradients = []
        if expected.requires_grad:
            gradients = torch.autograd.grad(expected, tensors, upstream.to(expected.dtype))
            assert all(g.abs().max() > 0 for g in gradients)
        found = processes.run(shard_of, op.name, plain, labels, sizes, op.dim, op.rows, options, upstream)
        sharded = op.rows or op.name == "importance_weights"
        if sharded:
            values = [torch.cat([value for value, _ in found], op.dim if expected.dim() > 1 else 0)]
        else:
            values = [value for value, _ in found]
        for value in values:
            assert value.dtype == dtype
            assert_close(value, expected, TOLERANCE[dtype])
        for i, gradient in enumerate(gradients):
            assert_close(torch.cat([of[i] for _, of in found], op.dim), gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.shapes[0]}-{op.options}")
def test_the_number_and_gradients_of_one_process(processes: Processes, op: Op, dtype: torch.dtype) -> None:
    compare(processes, op, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.shapes[0]}-{op.options}")
def test_nccl(processes_with_gpus: Processes, op: Op, dtype: torch.dtype) -> None:
    compare(processes_with_gpus, op, dtype)


def test_rows_without_weight(processes: Processes) -> None:
    log_w = torch.full((2, 4 * processes.count), -math.inf)
    log_w[1, -1] = 3.0
    sizes = [4] * processes.count
    for name, expected in (
        ("log_mean_exp", [-math.inf, 3 - math.log(4 * processes.count)]),
        ("importance_weights", None),
    ):
        found = processes.run(shard_of, name, [log_w], None, sizes, 1, False, {"dim": 1}, torch.ones(2))
        for rank, (value, gradients) in enumerate(found):
            last = torch.zeros(2, 4)
            last[1, -1] = float(rank == processes.count - 1)
            if expected is not None:
                assert_close(value, torch.tensor(expected), 1e-6)
            assert_close(gradients[0] if gradients else value, last, 1e-6)


@pytest.mark.parametrize(
    "op",
    [Op(name, shapes, rows=name == "importance_weights", scale=1.0, **options) for name, shapes, options in (
        ("log_mean_exp", [("n", 5)], {}),
        ("importance_weights", [("n", 5)], {"temperature": 0.7, "detach": False}),
        (IW, [("n",)], {"temperature": 0.7}),
        ("mmd", [("n", 3), ("n", 3)], {}),
    )],
    ids=lambda op: op.name,
)  # fmt: skip
def test_bfloat16_is_computed_as_on_one_process(processes: Processes, op: Op) -> None:
    sizes = SHARDS[processes.count][0]
    tensors = [x.requires_grad_() for x in op.tensors(sum(sizes), torch.bfloat16)]
    options = {**op.options, **({"dim": 0} if op.name in ("log_mean_exp", "importance_weights") else {})}
    expected = call(getattr(uf, op.name), tensors, options)
    upstream = draw(*expected.shape, seed=9).float()
    gradients = torch.autograd.grad(expected, tensors, upstream)
    plain = [x.detach() for x in tensors]
    found = processes.run(shard_of, op.name, plain, None, sizes, 0, op.rows, options, upstream)
    values = [value for value, _ in found]
    for value in [torch.cat(values)] if op.rows else values:
        assert value.dtype == expected.dtype == torch.float32
        assert_close(value, expected.detach(), 1e-5)
    for i, gradient in enumerate(gradients):
        assert_close(torch.cat([of[i] for _, of in found]), gradient, 1e-2)


# ---- what travels ----------------------------------------------------------------------------------------------------


def counted(name: str, shape: tuple[int, ...], options: dict[str, Any], backward: bool) -> list[tuple[str, int]]:
    """Collectives and the bytes that this process puts into each."""
    sent: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting(kind: str, function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            sent.append((kind, args[place].numel() * args[place].element_size()))
            return function(*args, **kwargs)

        return wrapped

    dist.all_gather, dist.all_reduce = counting("gather", gather, 1), counting("reduce", reduce, 0)
    try:
        x = torch.randn(shape, requires_grad=True)
        value = call(getattr(uf.distributed, name), [x], options)
        if backward:
            value.square().sum().backward()
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    return sent


@pytest.mark.parametrize(
    ("name", "options", "collectives"),
    [
        ("log_mean_exp", {"dim": 1}, ["gather"]),
        ("importance_weights", {"dim": 1}, ["gather"]),
        ("importance_weights", {"dim": 1, "detach": False}, ["gather", "gather"]),
        (IW, {"dim": 1}, ["gather"]),
        (IW, {}, ["gather"]),
    ],
)
def test_what_travels_does_not_grow_with_the_samples(
    processes: Processes, name: str, options: dict[str, Any], collectives: list[str]
) -> None:
    backward = name != "importance_weights" or "detach" in options
    few, many = (processes.run(counted, name, (8, k), options, backward)[0] for k in (3, 30_000))
    assert few == many
    assert [kind for kind, _ in few] == collectives
    assert sum(size for _, size in few) < 4096


class Counting(TorchDispatchMode):
    ops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return function(*args, **(kwargs or {}))


def ops_of_labels(count: int) -> int:
    with Counting() as mode:
        uf.distributed.importance_weighted_generator_loss(fake=torch.zeros(count), groups=torch.arange(count))
    return mode.ops


def test_labels_take_no_loop(processes: Processes) -> None:
    few, many = (processes.run(ops_of_labels, count)[0] for count in (40, 3000))
    assert 0 < many <= few


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def one_is_wrong(name: str, wrong: Any, right: Any, options: dict[str, Any]) -> Any:
    return call(getattr(uf.distributed, name), [wrong if dist.get_rank() == 1 else right], options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), "expected a floating-point tensor"),
        ([1.0, 2.0], "expected a"),
        (torch.zeros(4), "dim: got 1"),
        (torch.zeros(5, 3), "rank 1"),
        (torch.zeros(4, 3, dtype=torch.float64), "rank 1"),
    ],
    ids=["integers", "list", "dimensions", "shape", "dtype"],
)
@pytest.mark.parametrize("name", ["log_mean_exp", "importance_weights", IW])
def test_bad_input_on_one_process(processes: Processes, name: str, wrong: Any, message: str) -> None:
    found = processes.attempt(one_is_wrong, name, wrong, torch.zeros(4, 3), {"dim": 1})
    for rank, (ok, text) in enumerate(found):
        assert not ok and message in text
        assert text.startswith(("ValueError", "TypeError")) and (rank == 1 or "rank 1" in text)
    # and the group goes on
    right = processes.run(one_is_wrong, name, torch.zeros(4, 3), torch.zeros(4, 3), {"dim": 1})
    assert all(x.isfinite().all() for x in right)


def no_samples(name: str) -> Any:
    return call(getattr(uf.distributed, name), [torch.empty(4, 0)], {"dim": 1})


@pytest.mark.parametrize("name", ["log_mean_exp", "importance_weights", IW])
def test_no_samples_at_all(processes: Processes, name: str) -> None:
    for ok, text in processes.attempt(no_samples, name):
        assert not ok and text.startswith("ValueError") and "no samples on any rank" in text


# ---- who is to blame -------------------------------------------------------------------------------------------------

NAMES = ["log_mean_exp", "importance_weights", IW, "total_correlation", "mmd"]
WITH_BACKWARD = ["importance_weights", "total_correlation"]  # in which processes meet


def blamed(text: str) -> set[int]:
    """The ranks that a message names."""
    return {int(rank) for rank in re.findall(r"rank (\d)", text.split("\n")[0])}


def call_of(name: str, *, group: Any = None, x: Tensor | None = None, **options: Any) -> Tensor:
    """A call of any of the functions, with these options in place of its usual ones."""
    usual: dict[str, Any] = {"dim": 0} if name in ("log_mean_exp", "importance_weights", IW) else {}
    usual |= {"importance_weights": {"detach": False}, "total_correlation": {"dataset_size": 100}}.get(name, {})
    x = torch.ones(4, 3, requires_grad=True) if x is None else x
    tensors = [x] * {"mmd": 2, "total_correlation": 3}.get(name, 1)
    return call(getattr(uf.distributed, name), tensors, {**usual, **options, "group": group})


def attempt(job: Callable[[], Any]) -> str:
    try:
        job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "a value"


def right(group: Any = None, step: int = 0) -> bool:
    """Whether a call of the group finds the number of this step on all processes."""
    every = torch.arange(1.0, dist.get_world_size() + 1) + 10 * step
    found = uf.distributed.log_mean_exp(every[dist.get_rank()].repeat(2), dim=0, group=group)
    return bool((found - uf.log_mean_exp(every, dim=0)).abs() < 1e-4)


def short_group(seconds: float = 4.0) -> Any:
    return dist.new_group(timeout=timedelta(seconds=seconds))


def patched(name: str, replacement: Any, job: Callable[[], Any], rank: int = 1) -> str:
    """What a job comes to where rank 1 has another function of the module."""
    original = getattr(uf.distributed, name)
    if dist.get_rank() == rank:
        setattr(uf.distributed, name, replacement)
    try:
        return attempt(job)
    finally:
        setattr(uf.distributed, name, original)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    KeyError("k"),
    AssertionError("\ud800\0é" * 500),
    ValueError("v"),
]


def one_raises() -> list[tuple[str, str, str, bool]]:
    group, found = short_group(), []
    for name in NAMES:
        for error in ERRORS:

            def fail(*args: Any, error: Exception = error, **options: Any) -> Any:
                raise error

            text = patched("_kind", fail, lambda name=name: call_of(name, group=group))
            found.append((name, type(error).__name__, text, right(group, len(found))))
    return found


def test_whatever_one_process_raises_reaches_all(processes: Processes) -> None:
    for rank, found in enumerate(processes.run(one_raises)):
        assert len(found) == len(NAMES) * len(ERRORS)
        for name, error, text, goes_on in found:
            assert goes_on
            if rank == 1:
                assert text.startswith(error)
            else:
                assert text.startswith("ValueError" if error == "ValueError" else "RuntimeError")
                assert f"{name}: on rank 1, {error}" in text and blamed(text) == {1}


def one_raises_late(where: str) -> list[tuple[str, str, bool]]:
    """Once the others have its numbers."""
    group, found = short_group(), []
    original = getattr(uf.distributed, where)

    def fail(*args: Any) -> Any:
        original(*args)
        raise MemoryError("no memory")

    for name in NAMES if where == "_exchange" else WITH_BACKWARD[:1]:

        def job(name: str = name) -> Any:
            value = call_of(name, group=group)
            return value.sum().backward() if where == "_sum" else value

        found.append((patched(where, fail, job), attempt(job), right(group, len(found))))
    return found


@pytest.mark.parametrize("where", ["_exchange", "_sum"])
def test_what_one_process_raises_late_is_told_in_the_next_call(processes: Processes, where: str) -> None:
    for rank, found in enumerate(processes.run(one_raises_late, where)):
        for first, second, goes_on in found:
            assert first == ("MemoryError: no memory" if rank == 1 else "a value")
            assert second.startswith("RuntimeError") and "MemoryError: no memory" in second and blamed(second) == {1}
            assert goes_on


X = torch.ones(4, 3)
DIFFERENCES = [
    *((name, "requires_grad", {"x": X}) for name in NAMES),
    *((name, "dtype", {"x": X.double().requires_grad_()}) for name in NAMES),
    *((name, "dim", {"dim": 1}) for name in ("log_mean_exp", "importance_weights", IW)),
    *((name, "temperature", {"temperature": 2.0}) for name in ("importance_weights", IW)),
    ("importance_weights", "detach", {"detach": True}),
    (IW, "detach", {"detach": False}),
    (IW, "groups", {"dim": None, "groups": torch.arange(12)}),
    (IW, "reduction", {"reduction": "sum"}),
    ("total_correlation", "estimator", {"estimator": "mws"}),
    ("total_correlation", "dataset_size", {"dataset_size": 101}),
    ("total_correlation", "cols", {"x": torch.ones(4, 2, requires_grad=True)}),
    ("mmd", "kernel", {"kernel": "rbf"}),
    ("mmd", "scales", {"scales": [i / 7 for i in range(1, 17)]}),
    ("mmd", "unbiased", {"unbiased": False}),
]


def one_differs() -> list[tuple[str, bool]]:
    group, found = short_group(), []
    for name, _, options in DIFFERENCES:
        options = options if dist.get_rank() == 1 else {}
        found.append((attempt(lambda: call_of(name, group=group, **options)), right(group, len(found))))  # noqa: B023
    with torch.set_grad_enabled(dist.get_rank() != 1):
        found.append((attempt(lambda: call_of("importance_weights", group=group)), right(group)))
    one = 1 if dist.get_rank() == 1 else 1.0  # the same number
    assert attempt(lambda: call_of("importance_weights", group=group, temperature=one)) == "a value"
    other = NAMES[0] if dist.get_rank() == 1 else NAMES[1]
    found.append((attempt(lambda: call_of(other, group=group)), right(group)))
    return found


def test_what_must_agree_is_compared(processes: Processes) -> None:
    """Where most agree, they are not to blame; of two processes, either may be."""
    options = [*(option for _, option, _ in DIFFERENCES), "requires_grad", "function"]
    for found in processes.run(one_differs):
        for (text, goes_on), option in zip(found, options, strict=True):
            assert goes_on
            assert text.startswith("RuntimeError" if option == "function" else "ValueError"), (option, text)
            assert re.search(rf"\b{option} \S.* on rank 1", text), (option, text)
            assert blamed(text) == ({1} if processes.count > 2 else {0, 1})


def one_is_interrupted() -> tuple[str, bool]:
    """It leaves one batch out, and is a call ahead of the others when they meet."""

    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    group, batches = short_group(), iter(range(3))
    if dist.get_rank() == 1:
        try:
            patched("_kind", interrupt, lambda: call_of("log_mean_exp", group=group, x=X + next(batches)))
        except KeyboardInterrupt:
            pass
    return attempt(lambda: call_of("log_mean_exp", group=group, x=X + next(batches))), right(group)


def test_a_process_that_is_a_call_ahead_is_found_and_comes_back_in_step(processes: Processes) -> None:
    for text, goes_on in processes.run(one_is_interrupted):
        assert re.match(
            "RuntimeError: log_mean_exp: expected every rank at the same call, got call .*2 on rank 1", text
        )
        assert blamed(text) == ({1} if processes.count > 2 else {0, 1})
        assert goes_on


def one_skips_backward(name: str, comes_again: bool) -> tuple[str, bool]:
    group = short_group() if comes_again else short_group(2.0)
    value = call_of(name, group=group)
    if dist.get_rank() != 1:
        text = attempt(lambda: value.sum().backward())
    elif comes_again:
        text = attempt(lambda: call_of(name, group=group))
    else:
        return "", False
    return text, comes_again and right(group)


@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_a_backward_that_is_skipped(processes: Processes, name: str) -> None:
    for text, goes_on in processes.run(one_skips_backward, name, True):
        assert text.startswith("RuntimeError") and f'"{name}" on rank 1' in text
        assert blamed(text) == ({1} if processes.count > 2 else {0, 1})
        assert goes_on


def test_a_process_that_stays_away_from_backward_is_named(processes: Processes) -> None:
    for rank, (text, _) in enumerate(processes.run(one_skips_backward, "importance_weights", False)):
        assert rank == 1 or text.startswith("RuntimeError: importance_weights, backward: rank 1 did not take part")


def one_stays_away() -> tuple[str, float, str]:
    """Seconds of the call's 2; and what the next call comes to."""
    group = short_group(2.0)
    dist.barrier()
    begun = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(2.5)
        return "", 0.0, attempt(lambda: call_of("log_mean_exp", group=group))
    text = attempt(lambda: call_of("log_mean_exp", group=group))
    return text, time.monotonic() - begun, attempt(lambda: call_of("log_mean_exp", group=group))


def test_a_process_that_does_not_come_is_named(processes: Processes) -> None:
    for rank, (text, seconds, again) in enumerate(processes.run(one_stays_away)):
        if rank != 1:
            assert text.startswith("RuntimeError: log_mean_exp: rank 1 did not take part in call 1")
            assert blamed(text) == {1} and seconds < 4
            assert "got a group that cannot go on" in again
        assert again.startswith("RuntimeError") and blamed(again) == {1}


def one_has_no_memory_for_the_second_collective() -> str:
    group = short_group(20.0)
    return patched("F", None, lambda: uf.distributed.log_mean_exp(torch.zeros(70, 3), dim=1, group=group))


def test_a_process_that_cannot_take_part_in_the_second_collective_is_named(processes: Processes) -> None:
    for text in processes.run(one_has_no_memory_for_the_second_collective):
        assert text.startswith("RuntimeError: log_mean_exp: rank 1 raised AttributeError") and blamed(text) == {1}


def one_is_late() -> bool:
    if dist.get_rank() == 1:
        time.sleep(1)
    return right()


def test_a_process_that_is_late_is_waited_for(processes: Processes) -> None:
    assert all(processes.run(one_is_late))


def test_without_a_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        uf.distributed.log_mean_exp(torch.zeros(3), dim=0)


# ---- data-parallel training ------------------------------------------------------------------------------------------


def generator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def discriminator() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 1)).double()


def documented_step(z: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The code of docs/distributed.md."""
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {"generator": generator(), "discriminator": discriminator(), "z": own(z, sizes)}
    exec(code, scope)
    return [scope["loss"].detach(), *(p.grad for p in scope["generator"].parameters())]


def test_documented_step_is_that_of_one_process(processes: Processes) -> None:
    sizes = [3] * processes.count
    z = draw(sum(sizes), 3, seed=1, scale=4.0)
    model = generator()
    loss = uf.importance_weighted_generator_loss(fake=discriminator()(model(z)))
    loss.backward()
    for found in processes.run(documented_step, z, sizes):
        for x, expected in zip(found, [loss, *(p.grad for p in model.parameters())], strict=True):
            assert_close(x, expected, 1e-12)


class Conditional(nn.Module):
    """Of x or z, and a label."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.network(x) * (1 + 0.3 * label[:, None])


def of_model(name: str, x: Tensor, labels: Tensor, sizes: Sequence[int] | None) -> list[Tensor]:
    """A generator's phase, on one process or several: the loss, and the gradients added up."""
    options: dict[str, Any] = {"latent": 3, "noise": lambda *shape, **kwargs: x if sizes is None else own(x, sizes)}
    networks, batch = [generator(), discriminator()], [torch.zeros(len(x), 1, dtype=x.dtype)]
    if name == "IWConditionalGAN":
        networks, batch = [Conditional(net) for net in networks], [*batch, labels]
        options["per_class"] = True
    if sizes is not None:
        options["group"], batch = dist.group.WORLD, [own(t, sizes) for t in batch]
    model = getattr(uf.models, name)(*networks, **options)
    loss = model.losses("generator", tuple(batch) if len(batch) > 1 else batch[0])["loss"]
    loss.backward()
    gradients = [p.grad for p in networks[0].parameters()]
    for gradient in gradients if sizes is not None else ():
        dist.all_reduce(gradient)
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("name", ["IWGAN", "IWConditionalGAN"])
def test_models_take_a_group(processes: Processes, name: str) -> None:
    sizes = [2 + rank for rank in range(processes.count)]
    x = draw(sum(sizes), 3, seed=1, scale=4.0)
    labels = torch.arange(len(x)) % 3
    for found in processes.run(of_model, name, x, labels, sizes):
        for ours, expected in zip(found, of_model(name, x, labels, None), strict=True):
            assert expected.abs().max() > 0
            assert_close(ours, expected, 1e-12)


def second_derivative(name: str, options: dict[str, Any]) -> Any:
    x = torch.randn(4, 3, requires_grad=True)
    tensors = [x] * {"mmd": 2, "total_correlation": 3}.get(name, 1)
    value = call(getattr(uf.distributed, name), tensors, options)
    return torch.autograd.grad(value.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("log_mean_exp", {"dim": 0}),
        ("importance_weights", {"dim": 0, "detach": False}),
        (IW, {}),
        ("total_correlation", {"dataset_size": 100}),
        ("mmd", {}),
    ],
)
def test_second_derivatives_are_refused(processes: Processes, name: str, options: dict[str, Any]) -> None:
    for ok, text in processes.attempt(second_derivative, name, options):
        assert not ok and text.startswith("RuntimeError: unigen_fast.distributed: got create_graph=True")


# ---- last: it ends a process ---------------------------------------------------------------------------------------


def one_dies(victim: int) -> tuple[str, str]:
    group = short_group(20.0)
    assert right(group)
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == 1:
        time.sleep(1)
    return tuple(attempt(lambda: call_of("log_mean_exp", group=group)) for _ in range(2))  # type: ignore[return-value]


def test_a_process_that_dies_is_named(processes: Processes) -> None:
    """Of two processes, the one that keeps the store; of four, one that not all wait for in a ring."""
    victim = 0 if processes.count == 2 else 2
    for rank, (ok, found) in enumerate(processes.attempt(one_dies, victim)):
        assert ok != (rank == victim), found
        for text in found if ok else ():
            assert f"rank {victim} did not take part in call 2" in text and blamed(text) == {victim}, text
