"""PyTorch's features, with every public function: what docs/framework.md says is what these tests show.

See `framework.py` for how a test becomes a cell.
"""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import framework
import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.distributed as dist
from cases import CASES, Case
from cases.base import Spec, last
from framework import FEATURES, FUNCTIONS, NOT_RUN, feature
from functorch.compile import make_boxed_func
from helpers import (
    LOW_PRECISION,
    OPS,
    as_tuple,
    assert_close,
    assert_same_bits,
    cotangents_like,
    leaves,
    make,
    pull_back,
    value_and_gradients,
)
from test_nn import CALLS, FUNCTION_OF, connected, moved
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import unigen_fast as uf


def _dreg(x: Tensor, theta: Tensor) -> Tensor:
    z = x * 1.0  # the hook stays with it
    return uf.dreg_loss(-0.5 * (z * theta).square(), z, dim=1)


def _r1(x: Tensor, w: Tensor) -> Tensor:
    return uf.r1_penalty(logits=torch.tanh(x * w).sum(-1), inputs=x)


def _gradient_penalty(w: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    return uf.gradient_penalty(discriminator=lambda x: torch.tanh(x * w).sum(-1), real=real, fake=fake)


def _streaming(x: Tensor) -> Tensor:
    return uf.streaming_log_likelihood([x[:, :2], x[:, 2:]], dim=1)


def _without_oracle(*tensors: Tensor) -> Any:
    raise NotImplementedError  # their own tests have one


def _vector(n: int) -> Spec:
    return Spec((n,), "std")


# functions of a graph, of a network or of a list, which the tests of single ops cannot take
COMPOSITIONS = [
    Case("dreg_loss", _dreg, lambda r, n: [Spec((r, n)), _vector(n)], _without_oracle, derivative=False),
    Case("r1_penalty", _r1, lambda r, n: [Spec((r, n)), _vector(n)], _without_oracle),
    Case(
        "gradient_penalty",
        _gradient_penalty,
        lambda r, n: [_vector(n), *[Spec((r, n), differentiable=False)] * 2],
        _without_oracle,
        random=True,
    ),
    Case("streaming_log_likelihood", _streaming, last("log_w"), _without_oracle, differentiable=False),
]
EVERY = [*CASES, *COMPOSITIONS]
FIRST = list({case.function: case for case in reversed(EVERY)}.values())  # one of each function


def weighted_sum(outputs: Any, cotangents: list[Tensor | None]) -> Tensor:
    """Of all outputs; those that are detached count with 1."""
    pairs = zip(as_tuple(outputs), cotangents, strict=True)
    return sum(o.sum() if c is None else (o * c).sum() for o, c in pairs)  # type: ignore[return-value]


def fixed_noise(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> Any:
        torch.manual_seed(7)
        return call(*tensors)

    return run


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled_for(case: Case, backend: str, batches: list[list[Tensor]]) -> None:
    """One graph for all the batches, with the numbers of the eager call."""
    counter = CompileCounterWithBackend(backend)
    compiled = fixed_noise(torch.compile(case.call, fullgraph=True, backend=counter))
    for tensors in batches:
        expected, expected_gradients, cotangents = value_and_gradients(fixed_noise(case.call), tensors)
        got, gradients, _ = value_and_gradients(compiled, tensors, cotangents)
        assert counter.frame_count == 1
        for a, b in zip([*got, *gradients], [*expected, *expected_gradients], strict=True):
            assert_close(a, b, 1e-5, absolute=1e-30)


def two_batches(case: Case, device: torch.device) -> list[list[Tensor]]:
    return [make(case, 4, 6, dtype=torch.float32, device=device, seed=seed) for seed in (1, 2)]


@feature("compile", FIRST)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile(case: Case, device: torch.device) -> None:
    compiled_for(case, "aot_eager", two_batches(case, device))


INDUCTOR = [
    "gaussian_kl",
    "generator_loss[saturating,none]",
    "sample_gaussian_with_kl",
    "discriminator_loss",
    "iwae_loss",
]


@pytest.mark.parametrize("of_reference", [True, False], ids=["reference", "kernel"])
@feature("compile", [c for c in CASES if c.name in INDUCTOR])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_inductor(
    case: Case, of_reference: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not of_reference:
        for op in OPS.values():
            monkeypatch.setattr(op, "inline_below", 0)
    compiled_for(case, "inductor", two_batches(case, device))


def ops_in_graphs(call: Callable[..., Any], *tensors: Tensor) -> tuple[list[str], list[str]]:
    """Ours, in the forward and in the backward graph of the compiled call."""
    found: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        found.append([target._opname for target in targets if target.namespace == "unigen_fast"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    torch.compile(call, fullgraph=True, backend=backend)(*tensors).backward()
    forward, backward = found
    return forward, backward


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_steps_take_the_gradients_of_the_forward_pass(device: torch.device) -> None:
    """An objective makes its gradients along with the loss; others are asked for only where other outputs are used."""
    decoder, x, z = (torch.randn(4, k, 9, device=device, requires_grad=k > 1) for k in (3, 1, 3))
    mean, logvar = (torch.randn(4, 9, device=device, requires_grad=True) for _ in range(2))
    found = ops_in_graphs(lambda *t: uf.elbo_loss(*t).loss, decoder[:, 0], x[:, 0], mean, logvar)
    assert found == (["elbo_loss"], [])
    found = ops_in_graphs(lambda *t: uf.iwae_objective(*t, dim=1).loss, decoder, x[:, 0], z, mean, logvar)
    assert found == (["multi_sample_bound"], [])
    found = ops_in_graphs(lambda *t: sum(o.mean() for o in uf.elbo_loss(*t)), decoder[:, 0], x[:, 0], mean, logvar)
    assert found == (["elbo_loss"], ["elbo_loss_backward"])


FEW = OPS["iwae_loss"].inline_below


@pytest.mark.parametrize(
    ("call", "op", "most"),
    [
        (lambda x: uf.iwae_loss(x, dim=1), "iwae_loss", FEW),
        (lambda x: uf.gaussian_kl(x, x), "gaussian_kl", FEW / 2),
        (lambda x: uf.discriminator_loss(real=[x, x], fake=[x, x]), "logit_loss", FEW / 4),
        (lambda x: uf.discriminator_loss(real=x, fake=x, kind="hinge"), "logit_loss", math.inf),
        (lambda x: uf.generator_loss(fake=x, kind="least_squares"), "logit_loss", math.inf),
        (lambda x: uf.discriminator_loss(real=x, fake=x, kind="hinge", return_stats=True)[0], "logit_loss", FEW / 2),
        (lambda x: uf.bernoulli_kl(x), "bernoulli_kl", 0),
    ],
    ids=["iwae_loss", "gaussian_kl", "discriminator", "hinge", "least_squares", "statistics", "bernoulli_kl"],
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_the_compiler_has_the_reference_of_few_elements(
    call: Callable[..., Any], op: str, most: float, device: torch.device
) -> None:
    """Which it fuses with the network; the kernel of more, or of a number that it does not know."""
    for rows in (16, 256, 2048):
        x = torch.randn(rows, 100, device=device, requires_grad=True)
        forward, backward = ops_in_graphs(call, x)
        by_kernel = x.numel() >= most
        assert (forward, backward) == (([op], [f"{op}_backward"]) if by_kernel else ([], []))
        torch._dynamo.reset()
    x = torch.randn(16, 100, device=device, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    assert ops_in_graphs(call, x)[0] == ([] if most == math.inf else [op])


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_rows_without_weight(device: torch.device) -> None:
    """What infinities and NaN give, by the compiler's code of a reference too."""
    x = torch.randn(5, 6, device=device)
    x[0], x[1, 2], x[2, 3], x[3, 4] = -math.inf, -math.inf, math.inf, math.nan
    call = lambda x: uf.log_mean_exp(x, dim=1)  # noqa: E731
    compiled = torch.compile(lambda x: uf.log_mean_exp(x, dim=1), fullgraph=True)
    expected, expected_gradients, cotangents = value_and_gradients(call, [x.requires_grad_()])
    got, gradients, _ = value_and_gradients(compiled, [x], cotangents)
    for a, b in zip([*got, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@feature("dynamic shapes", EVERY)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_once_for_any_batch(case: Case, device: torch.device) -> None:
    batches = [make(case, rows, 6, dtype=torch.float32, device=device, layout="contiguous") for rows in (32, 33)]
    for x, y in zip(*batches, strict=True):
        for dim, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)):
            if a != b:
                torch._dynamo.mark_dynamic(x, dim)
    compiled_for(case, "aot_eager", batches)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_dynamic_shapes(device: torch.device) -> None:
    """Batch sizes that change, unmarked: one more compilation, for any size, and no more."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: uf.iwae_loss(x, dim=1) + uf.gaussian_kl(x, x), fullgraph=True, backend=counter)
    for rows in (4, 9, 6, 13):
        x = torch.randn(rows, 5, device=device, requires_grad=True)
        compiled(x).backward()
        (expected,) = torch.autograd.grad(uf.iwae_loss(x, dim=1) + uf.gaussian_kl(x, x), x)
        assert_close(x.grad, expected, 1e-5)
    assert counter.frame_count <= 2


R1 = next(case for case in COMPOSITIONS if case.function == "r1_penalty")


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch has no such option")
@pytest.mark.usefixtures("fresh_dynamo")
def test_r1_penalty_compiles_where_it_is_let(device: torch.device) -> None:
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled_for(R1, "aot_eager", two_batches(R1, device))


def test_gradient_penalty_has_the_value_of_r1(device: torch.device) -> None:
    """What the table offers in its place."""
    x, w = make(R1, 4, 6, device=device)
    got = uf.gradient_penalty(discriminator=lambda x: torch.tanh(x * w).sum(-1), real=x, fake=x, weight=5.0, target=0.0)
    assert_close(got, _r1(x, w), 1e-8)


# ---- autocast --------------------------------------------------------------------------------------------------------


def same_under_autocast(case: Case, device: torch.device, dtype: torch.dtype, autocast: torch.dtype) -> None:
    tensors = make(case, 4, 37, dtype=dtype, device=device)
    outside, gradients, cotangents = value_and_gradients(case, tensors)
    with torch.autocast(device.type, dtype=autocast):
        inside = as_tuple(case(*tensors))
    for got, expected in zip(inside, outside, strict=True):
        assert_same_bits(got, expected)
    for got, expected in zip(pull_back(inside, leaves(tensors), cotangents), gradients, strict=True):
        assert_same_bits(got, expected)


AUTOCAST = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), *((d, d) for d in LOW_PRECISION)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@feature("autocast, CPU", EVERY)
@pytest.mark.parametrize(("dtype", "autocast"), AUTOCAST, ids=str)
def test_results_are_fp32_under_autocast(case: Case, dtype: torch.dtype, autocast: torch.dtype) -> None:
    """Losses are unsafe in low precision (pytorch/pytorch#61098); autocast must not reach into them."""
    same_under_autocast(case, torch.device("cpu"), dtype, autocast)


@needs_cuda
@feature("autocast, CUDA", EVERY)
@pytest.mark.parametrize(("dtype", "autocast"), AUTOCAST, ids=str)
def test_results_are_fp32_under_cuda_autocast(case: Case, dtype: torch.dtype, autocast: torch.dtype) -> None:
    same_under_autocast(case, torch.device("cuda"), dtype, autocast)


# ---- torch.func and forward-mode AD ----------------------------------------------------------------------------------


def floating(tensors: list[Tensor]) -> list[bool]:
    return [x.is_floating_point() for x in tensors]


def of_differentiable(case: Case, tensors: list[Tensor]) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The case as a function of what it is differentiated in, and those tensors."""
    where = [i for i, x in enumerate(tensors) if x.requires_grad]

    def call(*xs: Tensor) -> tuple[Tensor, ...]:
        full = [x.detach() for x in tensors]
        for i, x in zip(where, xs, strict=True):
            full[i] = x
        return as_tuple(case(*full))

    return call, [tensors[i].detach() for i in where]


@feature("func.vmap", EVERY)
def test_vmap(case: Case, device: torch.device) -> None:
    stacks = [make(case, 3, 4, device=device, seed=seed) for seed in range(3)]
    fixed = floating(stacks[0])
    batched = [torch.stack(xs).detach() if f else xs[0] for xs, f in zip(zip(*stacks, strict=True), fixed, strict=True)]
    in_dims = tuple(0 if f else None for f in fixed)
    got = torch.vmap(lambda *ts: as_tuple(case(*ts)), in_dims=in_dims, randomness="same")(*batched)
    for i in range(3):
        each = [x[i] if f else x for x, f in zip(batched, fixed, strict=True)]
        for a, b in zip(got, as_tuple(case(*each)), strict=True):
            assert_close(a[i], b, 1e-10, absolute=1e-14)


@pytest.mark.parametrize("case", [c for c in FIRST if c.random], ids=repr)
def test_vmap_randomness(case: Case, device: torch.device) -> None:
    """PyTorch's modes: an error unless asked for, the noise of one call for all, or noise of its own for each."""
    tensors = [x.detach() for x in make(case, 3, 4, device=device)]
    in_dims = (0, *[None] * (len(tensors) - 1))
    batched = [torch.stack([tensors[0]] * 2), *tensors[1:]]
    found = {}
    for randomness in ("same", "different"):
        torch.manual_seed(3)
        found[randomness] = as_tuple(torch.vmap(case.call, in_dims=in_dims, randomness=randomness)(*batched))[0]
    assert_same_bits(found["same"][0], found["same"][1])
    assert (found["different"][0] != found["different"][1]).any()
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(case.call, in_dims=in_dims)(*batched)


@feature("func.grad", EVERY)
def test_func_grad(case: Case, device: torch.device) -> None:
    tensors = make(case, 3, 4, device=device)
    _, expected, cotangents = value_and_gradients(case, tensors)
    call, xs = of_differentiable(case, tensors)
    gradients = torch.func.grad(lambda *xs: weighted_sum(call(*xs), cotangents), argnums=tuple(range(len(xs))))(*xs)
    for got, e in zip(gradients, expected or map(torch.zeros_like, xs), strict=True):
        assert_close(got, e, 1e-10, absolute=1e-14)


@feature("func.vmap", [c for c in EVERY if c.function != "r1_penalty"])
def test_per_sample_gradients(case: Case, device: torch.device) -> None:
    tensors = make(case, 3, 4, device=device)
    where = tuple(i for i, x in enumerate(tensors) if x.requires_grad)
    _, _, cotangents = value_and_gradients(case, tensors)
    plain = [x.detach() for x in tensors]
    grad = torch.func.grad(lambda *ts: weighted_sum(case(*ts), cotangents), argnums=where)
    fixed = floating(plain)
    batched = [torch.stack([x, x.flip(0)]) if f else x for x, f in zip(plain, fixed, strict=True)]
    in_dims = tuple(0 if f else None for f in fixed)
    per_sample = torch.vmap(grad, in_dims=in_dims, randomness="same")(*batched)
    for i in range(2):
        each = [x[i] if f else x for x, f in zip(batched, fixed, strict=True)]
        for got, e in zip(per_sample, grad(*each), strict=True):
            assert_close(got[i], e, 1e-10, absolute=1e-14)


def check_tangents(case: Case, tensors: list[Tensor], tangents: list[Tensor], jvp: list[Tensor]) -> None:
    """<cotangent, J tangent> = <J^T cotangent, tangent>; what carries no gradient has no tangent either."""
    _, gradients, cotangents = value_and_gradients(case, tensors)
    assert not any(t.any() for c, t in zip(cotangents, jvp, strict=True) if c is None)
    products = [g * t for g, t in zip(gradients, tangents, strict=True)] if gradients else []
    left = sum((c * t).sum() for c, t in zip(cotangents, jvp, strict=True) if c is not None)
    scale = sum(p.abs().sum() for p in products)
    assert abs(left - sum(p.sum() for p in products)) <= 1e-10 * scale + 1e-14


@feature("func.jvp", EVERY)
def test_func_jvp(case: Case, device: torch.device) -> None:
    tensors = make(case, 3, 4, device=device)
    call, xs = of_differentiable(case, tensors)
    tangents = [torch.randn_like(x) for x in xs]
    primals, jvp = torch.func.jvp(call, tuple(xs), tuple(tangents))
    for a, b in zip(primals, as_tuple(case(*tensors)), strict=True):
        assert_close(a, b, 1e-10, absolute=1e-14)
    check_tangents(case, tensors, tangents, list(jvp))


@feature("forward_ad", EVERY)
def test_forward_mode_dual_tensors(case: Case, device: torch.device) -> None:
    """Outside torch.func: the tangent must come through, not be dropped in silence."""
    tensors = make(case, 3, 4, device=device)
    tangents = [torch.randn_like(x) for x in leaves(tensors)]
    with fwad.dual_level():
        rest = iter(tangents)
        duals = [fwad.make_dual(x, next(rest)) if x.requires_grad else x for x in tensors]
        outputs = [fwad.unpack_dual(o) for o in as_tuple(case(*duals))]
    jvp = [torch.zeros_like(o.primal) if o.tangent is None else o.tangent for o in outputs]
    check_tangents(case, tensors, tangents, jvp)


@feature("func.jacrev", EVERY)
def test_jacrev(case: Case, device: torch.device) -> None:
    call, (x, *others) = of_differentiable(case, make(case, 2, 3, device=device))
    everything = tuple(range(1 + len(others)))  # r1_penalty's logits hang on all
    jacobian, *_ = torch.func.jacrev(lambda *xs: call(*xs)[0], argnums=everything)(x, *others)
    leaf = x.clone().requires_grad_()
    flat = call(leaf, *others)[0].flatten()
    rows = [
        torch.autograd.grad(o, leaf, retain_graph=True)[0] if o.requires_grad else torch.zeros_like(x) for o in flat
    ]
    assert_close(jacobian.reshape(-1, *x.shape), torch.stack(rows), 1e-10, absolute=1e-14)


@feature("func.jacrev", [c for c in CASES if c.differentiable and c.derivative])
def test_hessian(case: Case, device: torch.device) -> None:
    """Forward over reverse, as second-order optimisers and Laplace approximations take it; symmetric."""
    tensors = make(case, 2, 3, device=device)
    cotangents = cotangents_like(as_tuple(case(*tensors)))
    several, (x, *others) = of_differentiable(case, tensors)

    def call(x: Tensor) -> Tensor:
        return weighted_sum(several(x, *others), cotangents)

    hessian = torch.func.jacfwd(torch.func.jacrev(call), randomness="same")(x).reshape(x.numel(), x.numel())
    assert_close(hessian, hessian.T, 1e-10, absolute=1e-14)
    assert_close(hessian.reshape(x.shape * 2), torch.autograd.functional.hessian(call, x), 1e-10, absolute=1e-14)


# ---- modules ---------------------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """A network before the loss, so that there is something to train."""

    def __init__(self, case: Case, tensors: list[Tensor]) -> None:
        super().__init__()
        self.case = case
        self.scales = torch.nn.ParameterList(torch.ones(x.shape[-1:], dtype=x.dtype) for x in leaves(tensors))
        self.differentiable = [x.requires_grad for x in tensors]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        scales = iter(self.scales)
        scaled = [x * next(scales) if d else x for x, d in zip(tensors, self.differentiable, strict=True)]
        return as_tuple(self.case.call(*scaled))


def wrapped(case: Case, device: torch.device) -> tuple[Wrapped, list[Tensor], list[Tensor | None]]:
    """The module, what it is called with, and cotangents of its outputs."""
    tensors = make(case, 3, 4, device=device)
    module = Wrapped(case, tensors).to(device)
    inputs = [x.detach() for x in tensors]
    return module, inputs, cotangents_like(as_tuple(fixed_noise(module)(*inputs)))


def trained(module: torch.nn.Module, inputs: list[Tensor], cotangents: list[Tensor | None]) -> list[Tensor]:
    """The parameters after two steps."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss = weighted_sum(fixed_noise(module)(*inputs), cotangents)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


@feature("functional_call", EVERY)
def test_functional_call(case: Case, device: torch.device) -> None:
    module, inputs, cotangents = wrapped(case, device)
    parameters = {name: p.detach().clone() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        call = fixed_noise(lambda *xs: torch.func.functional_call(module, parameters, xs))
        return weighted_sum(call(*inputs), cotangents)

    for _ in range(2):
        gradients = torch.func.grad(loss)(parameters)
        parameters = {name: p - 1e-3 * gradients[name] for name, p in parameters.items()}
    for got, expected in zip(parameters.values(), trained(module, inputs, cotangents), strict=True):
        assert_close(got, expected, 1e-10, absolute=1e-14)


@feature("export", FIRST)
def test_export_and_train(case: Case, device: torch.device) -> None:
    """The program, saved and loaded, has the module's numbers, and trains as it does."""
    module, inputs, cotangents = wrapped(case, device)
    file = io.BytesIO()
    torch.export.save(torch.export.export(copy.deepcopy(module), tuple(inputs)), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for got, expected in zip(fixed_noise(exported)(*inputs), fixed_noise(module)(*inputs), strict=True):
        assert_close(got, expected, 1e-10, absolute=1e-14)
    for got, expected in zip(trained(exported, inputs, cotangents), trained(module, inputs, cotangents), strict=True):
        assert_close(got, expected, 1e-10, absolute=1e-14)


@dataclass(frozen=True)
class OfModule:
    """A call of `test_nn`, as a case."""

    place: int

    @property
    def function(self) -> str:
        return FUNCTION_OF[CALLS[self.place][0]].__name__

    def __repr__(self) -> str:
        return f"{self.function}-{self.place}"


@feature("pickle, deepcopy", [OfModule(i) for i in range(len(CALLS))])  # type: ignore[list-item]
def test_copies_of_modules(case: OfModule, device: torch.device) -> None:
    """Those of `uf.models` are in test_models."""
    kind, options, args, kwargs = CALLS[case.place]
    args, kwargs = tuple(moved(x, device) for x in args), connected({n: moved(x, device) for n, x in kwargs.items()})
    module = kind(**options)
    expected = as_tuple(fixed_noise(lambda: module(*args, **kwargs))())
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(same) == repr(module)
        got = as_tuple(fixed_noise(lambda same=same: same(*args, **kwargs))())
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)


# ---- activation checkpointing ----------------------------------------------------------------------------------------


def checkpointed(case: Case, device: torch.device, use_reentrant: bool) -> None:
    """Activations drawn again in backward, noise included."""
    tensors = make(case, 3, 7, device=device)
    expected, gradients, cotangents = value_and_gradients(fixed_noise(case.call), tensors)
    torch.manual_seed(7)
    outputs = checkpoint(lambda *ts: as_tuple(case.call(*ts)), *tensors, use_reentrant=use_reentrant)
    for a, b in zip(outputs, expected, strict=True):
        assert_close(a, b, 1e-13)  # without a graph the value may come from another pass than the gradients'
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
    for x, e in zip(leaves(tensors), gradients, strict=bool(gradients)):
        assert_same_bits(x.grad, e)


@feature("checkpoint", EVERY)
@pytest.mark.usefixtures("node")
def test_checkpoint(case: Case, device: torch.device) -> None:
    checkpointed(case, device, use_reentrant=False)


@feature("reentrant checkpoint", EVERY)
@pytest.mark.usefixtures("node")
def test_reentrant_checkpoint(case: Case, device: torch.device) -> None:
    checkpointed(case, device, use_reentrant=True)


# ---- distributed tensors ---------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(device: torch.device) -> Iterator[Any]:
    """Of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()


def on_mesh(case: Case, mesh: Any, device: torch.device, *, shard: bool) -> None:
    """Value and gradients of DTensors, each tensor that has a batch sharded along it."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    tensors = make(case, 4, 6, device=device)
    longer = case.specs(5, 6)
    expected, expected_gradients, cotangents = value_and_gradients(case, tensors)
    distributed = []
    for x, spec in zip(tensors, longer, strict=True):
        dim = next((d for d, (a, b) in enumerate(zip(x.shape, spec.shape, strict=True)) if a != b), None)
        placement = Shard(dim) if shard and dim is not None else Replicate()
        distributed.append(distribute_tensor(x.detach(), mesh, [placement]).requires_grad_(x.requires_grad))
    outputs = as_tuple(case(*distributed))
    assert all(isinstance(o, DTensor) for o in outputs)
    whole = [o.full_tensor() for o in outputs]
    gradients = pull_back(whole, leaves(distributed), cotangents)
    got = [*whole, *(g.full_tensor() for g in gradients)]
    for a, b in zip(got, [*expected, *expected_gradients], strict=True):
        assert_close(a, b, 1e-10, absolute=1e-14)


@feature("DTensor", EVERY)
def test_dtensor(case: Case, mesh: Any, device: torch.device) -> None:
    for shard in (False, True):
        on_mesh(case, mesh, device, shard=shard)


def test_dtensor_of_two_processes() -> None:
    """The batch split between them; each has the numbers of one process, with noise of its own state or not."""
    environment = os.environ | {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment["MASTER_PORT"] = str(store.port)
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # both are the store's clients
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in "01"
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


def test_dtensors_do_not_mix(mesh: Any, device: torch.device) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    x = torch.randn(4, 6, device=device)
    with pytest.raises(TypeError, match="got a DTensor beside a Tensor of shape"):
        uf.gaussian_kl(distribute_tensor(x, mesh, [Replicate()]), x)


# ---- GPUs ------------------------------------------------------------------------------------------------------------


@needs_cuda
@feature("CUDA graph", EVERY)
def test_cuda_graph(case: Case, device: torch.device) -> None:
    """Captured once, replayed on other numbers; the noise moves on with each replay."""
    tensors = make(case, 6, 40, dtype=torch.float32, device=device)
    _, _, cotangents = value_and_gradients(case, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value_and_gradients(case.call, tensors, cotangents)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients, _ = value_and_gradients(case.call, tensors, cotangents)
    with torch.no_grad():
        for x in leaves(tensors):
            x.copy_(x.flip(0))
    graph.replay()
    first = outputs[0].clone()
    if case.random:
        graph.replay()
        assert not torch.equal(first, outputs[0])
        return
    expected, expected_gradients, _ = value_and_gradients(case, tensors, cotangents)
    for a, b in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert_same_bits(a, b)


@needs_cuda
@feature("CUDA stream", EVERY)
def test_on_another_stream(case: Case, device: torch.device) -> None:
    """The tensors are there only after that stream's long work: a kernel on another stream would read too soon."""
    tensors = make(case, 6, 40, dtype=torch.float32, device=device)
    expected, expected_gradients, cotangents = value_and_gradients(case, tensors)
    late = [torch.full_like(x, 3).requires_grad_(x.requires_grad) for x in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for x, y in zip(late, tensors, strict=True):
                x.copy_(y)
        outputs, gradients, _ = value_and_gradients(case, late, cotangents)
    stream.synchronize()
    for a, b in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert_same_bits(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@feature("second GPU", EVERY)
def test_on_another_device(case: Case) -> None:
    first, second = (make(case, 6, 40, dtype=torch.float32, device=torch.device("cuda", i)) for i in (0, 1))
    expected, expected_gradients, cotangents = value_and_gradients(case, first)
    moved_cotangents = [None if c is None else c.to("cuda:1") for c in cotangents]
    with torch.cuda.device(0):
        outputs, gradients, _ = value_and_gradients(case, second, moved_cotangents)
    assert all(x.device.index == 1 for x in (*outputs, *gradients))
    for a, b in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert_same_bits(a.to("cuda:0"), b)


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
def test_every_function_has_a_test_of(name: str) -> None:
    assert framework.SHOWN[name] == set(FUNCTIONS)


def test_the_table_says_what_the_tests_show() -> None:
    """A cell of a feature that needs a GPU may say that there was none; any other says what its tests check."""
    text = framework.TABLE.read_text()
    found = framework.read(text)
    cells = {
        (function, name): NOT_RUN[name] if found.get((function, name)) == NOT_RUN.get(name, "") else shown
        for function in FUNCTIONS
        for name in FEATURES
        for shown in [framework.shown(function, name)]
    }
    assert framework.render(cells) == text, "make framework"


def _process() -> None:
    """Of two, by the variables of `torchrun`; its generator is in a state of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for case in EVERY:
        on_mesh(case, mesh, torch.device("cpu"), shard=True)
    torch.manual_seed(dist.get_rank())
    from torch.distributed.tensor import Shard, distribute_tensor

    mean = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])
    z = uf.sample_gaussian(mean, mean).full_tensor()
    both = [torch.empty_like(z) for _ in range(2)]
    dist.all_gather(both, z)
    assert torch.equal(*both)  # the first process's noise
    dist.destroy_process_group()


if __name__ == "__main__":
    _process()
