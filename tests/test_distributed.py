"""Shards on 2 and 4 processes against the whole on one."""

import math
import multiprocessing
import re
import traceback
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

import unigen_fast as uf

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
SHARDS = {2: ([4, 3], [0, 5]), 4: ([3, 0, 5, 2], [2, 2, 2, 2])}

# ---- processes -------------------------------------------------------------------------------------------------------


def serve(rank: int, count: int, backend: str, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
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
    def __init__(self, count: int, folder: Path, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("spawn")
        self.count, self.pipes, self.started = count, [], []
        for rank in range(count):
            here, there = context.Pipe()
            args = (rank, count, backend, f"file://{folder / 'store'}", there)
            self.started.append(context.Process(target=serve, args=args, daemon=True))
            self.pipes.append(here)
            self.started[-1].start()

    def attempt(self, job: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """(whether it returned, what it returned or raised) of each process."""
        for pipe in self.pipes:
            pipe.send((job, args))
        assert all(pipe.poll(60) for pipe in self.pipes), "a process hangs"
        return [pipe.recv() for pipe in self.pipes]

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        found = self.attempt(job, *args)
        assert all(ok for ok, _ in found), next(text for ok, text in found if not ok)
        return [result for _, result in found]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.started, strict=True):
            pipe.send(None)
            process.join(10)


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(request.param, tmp_path_factory.mktemp("group"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def processes_with_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    if torch.cuda.device_count() < 2 or not dist.is_nccl_available():
        pytest.skip("fewer than two GPUs, or no NCCL")
    found = Processes(2, tmp_path_factory.mktemp("group"), "nccl")
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


def one_stays_away() -> Any:
    group = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == 1:
        return None
    return uf.distributed.log_mean_exp(torch.zeros(3), dim=0, group=group)


def test_a_process_that_does_not_come_is_named(processes: Processes) -> None:
    for rank, (ok, text) in enumerate(processes.attempt(one_stays_away)):
        if rank == 1:
            assert ok
        else:
            assert not ok and text.startswith("RuntimeError: log_mean_exp: rank 1 did not take part")


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
