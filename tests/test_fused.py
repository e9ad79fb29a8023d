"""What every op owes, whatever it computes: parametrised over the table in `cases`."""

import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from cases.base import draw_rng_state
from helpers import (
    LOW_PRECISION,
    NATIVE,
    OPS,
    as_tuple,
    assert_close,
    assert_same_bits,
    cotangents_like,
    expanded_rows,
    leaves,
    make,
    pull_back,
    recorded_ops,
    reference_path,
    sliced,
    stepped,
    tolerance,
    transposed,
    upcast,
    value_and_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import unigen_fast as uf

# Sizes along the reduced axis, as (rows, n), and why each is here:
SIZES = [
    (64, 1),  # nothing to reduce: K = 1 is the single-sample loss
    (300, 2),  # many rows with a short event: several rows share one vector or one warp
    (5, 3),
    (257, 7),  # one below, at and above 8: AVX2's vector of floats, AVX512's of doubles; rows are no multiple either
    (9, 8),
    (31, 15),  # around 16: AVX512's vector of floats, eight 16-bit loads twice
    (2, 16),
    (130, 17),
    (33, 31),  # around 32: a warp
    (7, 33),
    (1, 64),  # one row; a K that users have
    (20, 100),  # between: full vectors and a tail; about one log for the product of so many factors
    (16, 127),  # one less than a warp of 4-element loads
    (4, 512),  # at and just above a block's or an unrolled loop's worth
    (3, 513),
    (2, 784),  # MNIST pixels
    (5, 1000),
    (3, 4097),  # one element into the next tile
    (2, 5000),  # K of a test log-likelihood
    (2, 20000),  # few rows with a long event: several blocks or threads for one row, and the sum's rounding
]
FEW_SIZES = [(6, 1), (40, 5), (3, 33), (2, 513), (2, 1500)]
LAYOUT_SIZES = [(5, 7), (33, 16), (3, 261)]
STRIDED_LAYOUTS = ["contiguous", "transposed", "stepped", "expanded_rows", "expanded_last", "channels_last", "mixed"]

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
differentiable_cases = pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=repr)
exact_derivative_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.differentiable and c.derivative], ids=repr
)

single_op_cases = pytest.mark.parametrize("case", [c for c in CASES if not c.composed], ids=repr)


def one_per_op() -> list[Case]:
    """The first case that runs each op: where compiling or exporting every case would take minutes."""
    found: dict[str, Case] = {}
    for case in CASES:
        if case.composed:
            continue
        with recorded_ops() as calls:
            case(*make(case, 2, 3))
        for name, _, _ in calls:
            found.setdefault(name, case)
    return list(dict.fromkeys(found.values()))


ONE_PER_OP = one_per_op()
one_case_per_op = pytest.mark.parametrize("case", ONE_PER_OP, ids=repr)


def check(case: Case, tensors: list[Tensor]) -> None:
    """Value and every gradient against the reference evaluated in float64 on the same numbers."""
    outputs, gradients, cotangents = value_and_gradients(case, tensors)
    wide = upcast(tensors)
    with reference_path():
        expected, expected_gradients, _ = value_and_gradients(
            case, wide, [None if c is None else c.double() for c in cotangents]
        )
    dtype = tensors[0].dtype
    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for i, (got, e) in enumerate(zip(outputs, expected, strict=True)):
        sample = case.random and i == 0
        assert got.dtype == (dtype if sample else result_dtype)
        assert_close(got, e, *tolerance(got.dtype), what=f"output {i}")
    inputs = leaves(tensors) if case.differentiable else []
    for i, (x, got, e) in enumerate(zip(inputs, gradients, expected_gradients, strict=True)):
        assert got.dtype == x.dtype
        relative, absolute = tolerance(got.dtype)
        if case.broadcast and dtype in LOW_PRECISION:
            relative *= 4
        assert_close(got, e, relative, absolute, what=f"gradient {i}")


def test_every_op_has_a_case() -> None:
    covered = set()
    for case in CASES:
        tensors = make(case, 2, 3)
        with recorded_ops() as calls:
            value_and_gradients(case, tensors)
        covered |= {name for name, _, _ in calls}
    assert covered == set(OPS) | {f"{name}_backward" for name, op in OPS.items() if hasattr(op, "backward")}


# ---- equality --------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("size", [(5, 1), (7, 6), (3, 130)], ids=str)
def test_reference_equals_independent_formula(case: Case, size: tuple[int, int]) -> None:
    """The references against torch.distributions and PyTorch's own losses: value, gradient and second derivative."""
    tensors = make(case, *size)
    wide = upcast(tensors)
    outputs, expected = as_tuple(case(*tensors)), as_tuple(case.expected(*wide))
    assert len(outputs) == len(expected)
    for got, e in zip(outputs, expected, strict=True):
        assert_close(got, e, 1e-10, absolute=1e-14, what="value")
    cotangents = cotangents_like(outputs)
    firsts = pull_back(outputs, leaves(tensors), cotangents, create_graph=True, materialize_grads=True)
    expected_firsts = pull_back(expected, leaves(wide), cotangents, create_graph=True, materialize_grads=True)
    for got, e in zip(firsts, expected_firsts, strict=True):
        assert_close(got, e, 1e-10, absolute=1e-14, what="gradient")
    if not any(e.requires_grad for e in expected_firsts):
        return
    again = cotangents_like(expected_firsts, seed=2)
    options = {"materialize_grads": True, "allow_unused": True}
    seconds = pull_back(firsts, leaves(tensors), again, **options) or [torch.zeros_like(x) for x in leaves(tensors)]
    for got, e in zip(seconds, pull_back(expected_firsts, leaves(wide), again, **options), strict=True):
        assert_close(got, e, 1e-9, absolute=1e-13, what="second derivative")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "size"),
    [(case, size) for case in CASES for size in (SIZES if case.every_size else FEW_SIZES)],
    ids=lambda x: f"{x[0]}x{x[1]}" if isinstance(x, tuple) else repr(x),
)
def test_sizes(case: Case, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(case, make(case, *size, dtype=dtype, device=device, seed=size[1]))


@every_case
@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
@pytest.mark.parametrize("size", LAYOUT_SIZES, ids=str)
def test_layouts(case: Case, size: tuple[int, int], layout: str, device: torch.device) -> None:
    if layout == case.degenerate:
        pytest.skip("nothing but rounding to compare")
    for dtype in (torch.float64, torch.bfloat16 if size == LAYOUT_SIZES[1] else torch.float32):
        check(case, make(case, *size, dtype=dtype, device=device, layout=layout, seed=3))


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_no_rows(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """A batch of 0 gives what PyTorch gives: the mean of nothing is NaN, its sum 0, and gradients are empty."""
    check(case, make(case, 0, 5, dtype=dtype, device=device))


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_empty_event(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    tensors = make(case, 3, 0, dtype=dtype, device=device, layout="contiguous")
    if case.empty_event:
        check(case, tensors)
    else:
        with pytest.raises(ValueError, match="expected at least one sample along dim"):
            case(*tensors)


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Rows 2^31 elements apart (state-spaces/mamba#1015 overflowed). Only the pages of two rows are ever touched."""
    n, stride = 40, 2**31 + 64
    try:
        storage = torch.empty(stride + n, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("no 4 GiB to reserve")
    far = storage.as_strided((2, n), (stride, 1))
    far.copy_(torch.randn(2, n))
    near = far.clone()
    for call in (
        lambda x: uf.iwae_loss(x, dim=1),
        lambda x: uf.importance_weights(x, dim=1, detach=False),
        lambda x: uf.importance_weighted_generator_loss(fake=x, dim=1),
        lambda x: uf.discriminator_loss(real=x, fake=x),
        lambda x: uf.generator_loss(fake=x, reduction="none"),
        lambda x: uf.gaussian_kl(x, x),
        lambda x: uf.bernoulli_log_prob(x, x.detach()),
        lambda x: uf.total_correlation(x, x.detach(), x.detach() / 2, dataset_size=9),
        lambda x: uf.mmd(x, x.detach() + 1),
        lambda x: uf.categorical_kl(x, x.detach().flip(0)),
        lambda x: uf.categorical_log_prob(x, torch.tensor([3, 39], device=device)),
        lambda x: uf.discretized_logistic_mixture_log_prob(x, x[:, :3].detach().clamp(-1, 1), event_ndims=1),
    ):
        got, gradient, cotangents = value_and_gradients(call, [far.detach().requires_grad_()])
        expected, expected_gradient, _ = value_and_gradients(call, [near.detach().requires_grad_()], cotangents)
        assert_close(got[0], expected[0], 1e-6)
        assert_close(gradient[0], expected_gradient[0], 1e-2)


# ---- derivatives -----------------------------------------------------------------------------------------------------


both_nodes = pytest.mark.usefixtures("node")


def tuple_of(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """Those outputs that carry gradient."""
    return lambda *tensors: tuple(o for o in as_tuple(case(*tensors)) if o.requires_grad)


@both_nodes
@exact_derivative_cases
def test_gradcheck(case: Case, device: torch.device) -> None:
    tensors = make(case, 3, 4, device=device)
    assert torch.autograd.gradcheck(tuple_of(case), tensors, atol=1e-6, rtol=1e-5)


@both_nodes
@exact_derivative_cases
def test_gradgradcheck(case: Case, device: torch.device) -> None:
    tensors = make(case, 2, 3, device=device)
    assert torch.autograd.gradgradcheck(tuple_of(case), tensors, atol=1e-6, rtol=1e-5)


@exact_derivative_cases
def test_gradcheck_of_reference(case: Case, device: torch.device) -> None:
    """Its second derivatives are those of the fused path, checked above."""
    tensors = make(case, 2, 3, device=device)
    with reference_path():
        assert torch.autograd.gradcheck(tuple_of(case), tensors, atol=1e-6, rtol=1e-5)


@both_nodes
@differentiable_cases
def test_create_graph_changes_no_gradient(case: Case, device: torch.device) -> None:
    """Under create_graph the reference's differentiable backward runs; the gradient is the same."""
    for dtype in (torch.float64, torch.float32):
        tensors = make(case, 5, 9, dtype=dtype, device=device)
        outputs = as_tuple(case(*tensors))
        cotangents = cotangents_like(outputs)
        plain = pull_back(outputs, leaves(tensors), cotangents, retain_graph=True)
        differentiable = pull_back(outputs, leaves(tensors), cotangents, create_graph=True)
        for got, expected in zip(plain, differentiable, strict=True):
            assert_close(got, expected, tolerance(dtype)[0], absolute=1e-30)


@both_nodes
def test_second_derivative_of_shared_inputs(device: torch.device) -> None:
    """One input a function of another: only the direct dependence counts in each."""
    x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: uf.gaussian_kl(x, x.sin(), x.square(), x),
        lambda x: uf.bernoulli_log_prob(x, x.sigmoid()).sum(),
        lambda x: uf.discriminator_loss(real=x, fake=x * 2),
    ]
    for call in calls:
        assert torch.autograd.gradcheck(call, (x,))
        assert torch.autograd.gradgradcheck(call, (x,))
        (plain,), (differentiable,) = (torch.autograd.grad(call(x), x, create_graph=c) for c in (False, True))
        assert_close(differentiable, plain, 1e-12)


@differentiable_cases
def test_unneeded_gradients_are_none(case: Case, device: torch.device) -> None:
    """Each differentiable input alone: its gradient is as with all of them, and the others get None, not zeros."""
    if case.name == "iwae_objective[tvo]":
        pytest.skip("without a gradient of z it takes the samples for such as are not reparameterised")
    tensors = make(case, 4, 5, device=device)
    _, gradients, cotangents = value_and_gradients(case, tensors)
    for kept, expected in zip([i for i, x in enumerate(tensors) if x.requires_grad], gradients, strict=True):
        alone = [x.detach().requires_grad_(i == kept) for i, x in enumerate(tensors)]
        with recorded_ops() as calls:
            outputs = as_tuple(case(*alone))
            pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
            torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
        assert_close(alone[kept].grad, expected, 1e-12, absolute=1e-30)
        for name, overload, args in calls:
            if name.endswith("_backward") and OPS[name.removesuffix("_backward")].takes_needed:
                with torch.no_grad():
                    assert sum(g.numel() > 0 for g in overload(*args)) == 1, "no memory for what nobody asked for"
        assert all(x.grad is None for i, x in enumerate(alone) if i != kept)


@both_nodes
@every_case
def test_no_graph_without_gradients(case: Case, device: torch.device) -> None:
    tensors = make(case, 3, 4, device=device)
    with torch.no_grad():
        under_no_grad = as_tuple(case(*tensors))
    detached = as_tuple(case(*(x.detach() for x in tensors)))
    with torch.inference_mode():
        inference = as_tuple(case(*(x.detach() for x in tensors)))
    for a, b, c, d in zip(as_tuple(case(*tensors)), under_no_grad, detached, inference, strict=True):
        assert not b.requires_grad and not c.requires_grad and not d.requires_grad
        for other in (b, c, d):
            if "with gradient" in case.name:  # weights: then a sum of PyTorch's takes the place of the kernel's
                assert_close(other, a.detach(), 1e-14)
            else:
                assert_same_bits(other, a.detach())


# gradients that arrive with other strides than the output's: what `.sum()`, a transposition and a slice send back
COTANGENT_LAYOUTS = {
    "expanded": lambda g: g.flatten()[:1].clone().reshape((1,) * g.dim()).expand(g.shape),
    "expanded_rows": expanded_rows,
    "transposed": transposed,
    "sliced": sliced,
    "stepped": stepped,
}


@both_nodes
@differentiable_cases
@pytest.mark.parametrize("layout", COTANGENT_LAYOUTS)
def test_strides_of_incoming_gradient(case: Case, layout: str, device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32):
        tensors = make(case, 6, 11, dtype=dtype, device=device)
        outputs = as_tuple(case(*tensors))
        cotangents = [
            g if g is None or g.dim() == 0 else COTANGENT_LAYOUTS[layout](g.cpu()).to(device)
            for g in cotangents_like(outputs)
        ]
        got = pull_back(outputs, leaves(tensors), cotangents, retain_graph=True)
        plain = [None if g is None else g.contiguous() for g in cotangents]
        for a, b in zip(got, pull_back(outputs, leaves(tensors), plain), strict=True):
            assert_close(a, b, tolerance(dtype)[0], absolute=1e-30)


@both_nodes
@differentiable_cases
def test_gradient_of_sum(case: Case, device: torch.device) -> None:
    """`.sum().backward()`: the gradient that reaches the op is one number with strides of 0."""
    tensors = make(case, 5, 9, device=device)
    sum(o.sum() for o in as_tuple(case(*tensors)) if o.requires_grad).backward()
    wide = upcast(tensors)
    with reference_path():
        outputs = [o for o in as_tuple(case(*wide)) if o.requires_grad]
        expected = pull_back(outputs, leaves(wide), [torch.ones_like(o) for o in outputs])
    for x, e in zip(leaves(tensors), expected, strict=True):
        # weights sum to 1: their gradient is 0 but for rounding
        assert_close(x.grad, e, 1e-10, absolute=1e-14)


@both_nodes
def test_outputs_without_a_share_in_the_loss(device: torch.device) -> None:
    """Only z, or only the KL, of the two is used: the other's gradient is absent, not garbage."""
    for used in (0, 1):
        m, v = (torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
        torch.manual_seed(1)
        uf.sample_gaussian_with_kl(m, v)[used].sum().backward()
        torch.manual_seed(1)
        alone = uf.sample_gaussian(m, v) if used == 0 else uf.gaussian_kl(m, v, reduction="none")
        for got, expected in zip((m.grad, v.grad), torch.autograd.grad(alone.sum(), (m, v)), strict=True):
            assert_close(got, expected, 1e-12)


@both_nodes
@differentiable_cases
def test_retain_graph(case: Case, device: torch.device) -> None:
    """Backward twice gives the same bits: the first run has not spent or overwritten what was saved."""
    tensors = make(case, 4, 33, dtype=torch.float32, device=device)
    outputs = as_tuple(case(*tensors))
    cotangents = cotangents_like(outputs)
    once = pull_back(outputs, leaves(tensors), cotangents, retain_graph=True)
    kept = [g.clone() for g in once]
    for g in once:
        g.zero_()  # the caller owns its gradients
    twice = pull_back(outputs, leaves(tensors), cotangents, retain_graph=True)
    for got, expected in zip(twice, kept, strict=True):
        assert_same_bits(got, expected)
    pull_back(outputs, leaves(tensors), cotangents)
    with pytest.raises(RuntimeError, match="second time"):
        pull_back(outputs, leaves(tensors), cotangents)


# ---- what a call leaves behind ---------------------------------------------------------------------------------------


@both_nodes
@every_case
def test_no_input_is_written_to(case: Case, device: torch.device) -> None:
    """Forward and backward, the incoming gradient included (linkedin/Liger-Kernel#343 wrote into an input)."""
    tensors = make(case, 5, 19, dtype=torch.float32, device=device)
    before = [x.detach().clone() for x in tensors]
    versions = [x._version for x in tensors]
    outputs = as_tuple(case(*tensors))
    cotangents = cotangents_like(outputs)
    sent = [None if c is None else c.clone() for c in cotangents]
    results, result_versions = [o.detach().clone() for o in outputs], [o._version for o in outputs]
    pull_back(outputs, leaves(tensors), cotangents)
    assert [x._version for x in tensors] == versions
    assert [o._version for o in outputs] == result_versions
    for x, b in zip([*tensors, *outputs], [*before, *results], strict=True):
        assert_same_bits(x.detach(), b)
    for c, s in zip(cotangents, sent, strict=True):
        assert (c is None and s is None) or (torch.equal(c, s) and c._version == 0)


@both_nodes
@every_case
def test_results_alias_nothing(case: Case, device: torch.device) -> None:
    """No output shares memory with an input, and no gradient with anything the caller holds."""
    tensors = make(case, 4, 9, device=device)
    outputs, gradients, cotangents = value_and_gradients(case, tensors)
    held = [x.untyped_storage().data_ptr() for x in [*tensors, *(c for c in cotangents if c is not None)]]
    for result in [*outputs, *gradients]:
        assert result.untyped_storage().data_ptr() not in held


@pytest.mark.skipif(not NATIVE["cpu"], reason="PyTorch's own time")
@pytest.mark.parametrize("value", [-95.0, -1e4, -math.inf])
def test_no_time_is_lost_in_denormal_numbers(value: float) -> None:
    """A processor takes a hundred times as long where a result is denormal: masked log-weights, saturated logits."""
    ordinary = torch.randn(256, 512)
    extreme = torch.where(torch.rand(256, 512) < 0.5, ordinary, value)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "log_mean_exp": lambda x: uf.log_mean_exp(x, dim=1),
        "importance_weights": lambda x: uf.importance_weights(x, dim=1),
        "weighted sum": lambda x: uf.importance_weighted_sum(x, ordinary, dim=1),
        "generator_loss": lambda x: uf.generator_loss(fake=x),
        "bernoulli_log_prob": lambda x: uf.bernoulli_log_prob(x, ordinary.sigmoid()),
        "categorical_kl": lambda x: uf.categorical_kl(x, ordinary, unimix=0.01),
        "categorical_log_prob": lambda x: uf.categorical_log_prob(x, torch.arange(256)),
    }
    for name, call in calls.items():
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(30):
            for usual, x in ((True, ordinary), (False, extreme)):
                start = time.perf_counter()
                call(x)
                times[usual].append(time.perf_counter() - start)
        assert min(times[False]) < 3 * min(times[True]), name


@both_nodes
@single_op_cases
def test_saves_only_inputs_and_row_statistics(case: Case, device: torch.device) -> None:
    """Saved for backward: the caller's own tensors (a broadcast one not repeated), and at most three numbers a row."""
    rows, n = 6, 700
    tensors = make(case, rows, n, dtype=torch.float32, device=device)
    own = {x.untyped_storage().data_ptr() for x in tensors}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = as_tuple(case(*tensors))
    limit = 8 * 3 * 6 * rows * (n if "groups" in case.name else 1)  # with groups every sample is a row
    if case.name.startswith("importance_weights"):  # their own output is all that backward needs
        limit = outputs[0].nbytes
    elif case.name.startswith("total_correlation"):  # the marginals, without which backward would run forward again
        limit += tensors[0].nbytes
    elif not NATIVE["cpu"]:  # a closed form may make the gradients with the value, before they are summed up
        limit += int(1.25 * max(x.nbytes for x in tensors) * sum(x.requires_grad for x in tensors))
    elif case.made:
        limit += sum(x.nbytes for x in tensors if x.requires_grad)
    assert sum(saved.values()) <= limit


# linear losses are differentiated without their input, and importance weights by the weights alone
NEEDS_INPUT = [
    c
    for c in CASES
    if c.differentiable
    and not c.composed
    and c.name not in ("generator_loss[hinge,4-D]", "log_ratio")
    and not c.name.startswith("importance_weights[")
    and c.name != "importance_weights"
]


def test_nodes_are_the_ones_named(node: str, device: torch.device) -> None:
    x = torch.randn(4, device=device, requires_grad=True)
    grad_fn = uf.generator_loss(fake=x).grad_fn
    assert isinstance(grad_fn, torch.autograd.function.BackwardCFunction) == (node == "Python")


@both_nodes
def test_some_gradients_of_a_backward_pass(device: torch.device) -> None:
    """`torch.autograd.grad` for some of the inputs: the others cost nothing and get nothing."""
    tensors = [torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(4)]
    calls: list[Callable[..., Tensor]] = [
        uf.gaussian_kl,
        lambda a, b, c, d: uf.discriminator_loss(real=[a, b], fake=[c, d]),
        lambda a, b, c, d: uf.sample_gaussian_with_kl(a, b)[1].sum() + uf.bernoulli_log_prob(c, d).sum(),
    ]
    for call in calls:
        everything = torch.autograd.grad(call(*tensors), tensors)
        for i in range(4):
            (alone,) = torch.autograd.grad(call(*tensors), tensors[i : i + 1])
            assert_same_bits(alone, everything[i])


@both_nodes
def test_saved_tensor_hooks(device: torch.device) -> None:
    """What offloads or compresses saved tensors sees ours."""
    x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    seen: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t)
        return t.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = uf.iwae_loss(x, dim=1)
    assert [tuple(t.shape) for t in seen] == [(3, 4), (2, 3)]
    (gradient,) = torch.autograd.grad(loss, x)
    assert_close(gradient, -torch.softmax(x, 1) / 3, 1e-12)


@pytest.mark.skipif(not NATIVE["autograd"], reason="the autograd node in C++ is not loaded")
def test_the_node_has_the_name_of_its_op(device: torch.device) -> None:
    """As profiles and anomalies show it."""
    loss = uf.generator_loss(fake=torch.randn(3, device=device, requires_grad=True))
    assert loss.grad_fn is not None
    assert loss.grad_fn.name() == "unigen_fast::logit_loss_backward"


@pytest.mark.skipif(not NATIVE["autograd"], reason="the autograd node in C++ is not loaded")
def test_the_bare_op_passes_autograd_without_python(device: torch.device) -> None:
    """As compiled graphs call it in every step: Python's formulas take longer than the op. They still train it."""
    x = torch.randn(3, 4, device=device)
    entered: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        entered.append(Path(frame.f_code.co_filename).name)

    def ran_python(x: Tensor, grad: bool) -> bool:
        entered.clear()
        with torch.set_grad_enabled(grad):
            sys.setprofile(note)
            try:
                value, statistics = torch.ops.unigen_fast.log_mean_exp.default(x, 1)
                torch.ops.unigen_fast.log_mean_exp_backward.default(value, x, statistics, 1)
                torch.ops.unigen_fast.logit_loss.default([x, x], 1, 0, 1, "mean", 1.0, False)
            finally:
                sys.setprofile(None)
        return "autograd.py" in entered

    assert not ran_python(x, True)
    assert not ran_python(x.requires_grad_(), False)
    assert ran_python(x, True)
    value = torch.ops.unigen_fast.logit_loss.default([x.detach(), x], 1, 0, 1, "sum", 1.0, False)[0]
    (gradient,) = torch.autograd.grad(value, x)
    assert_close(gradient, x.detach().sigmoid(), 1e-5)


@both_nodes
def test_compiled_autograd(device: torch.device) -> None:
    """A backward pass that is compiled as a whole (as distributed training does)."""
    x, y = (torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    calls: list[Callable[[], Tensor]] = [
        lambda: uf.iwae_loss(x, dim=1),
        lambda: uf.discriminator_loss(real=[x], fake=[y]),
        lambda: uf.sample_gaussian_with_kl(x, y)[1].sum(),
    ]
    for call in calls:
        expected = torch.autograd.grad(call(), (x, y), allow_unused=True)
        x.grad = y.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            call().backward()
        for got, e in zip((x.grad, y.grad), expected, strict=True):
            assert (got is None) == (e is None)
            if got is not None:
                assert_close(got, e, 1e-12)


@both_nodes
def test_errors_of_python_code_in_between_reach_the_caller(device: torch.device) -> None:
    """A dispatch mode is called from within the op, forward and backward; what it raises is not swallowed."""

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "unigen_fast":
                raise KeyError(func._schema.name)
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 4, device=device, requires_grad=True)
    with Refusing(), pytest.raises(KeyError, match="unigen_fast::iwae_loss"):
        uf.iwae_loss(x, dim=1)
    loss = uf.iwae_loss(x, dim=1)
    with Refusing(), pytest.raises(KeyError, match="unigen_fast::iwae_loss_backward"):
        loss.backward()


class _Listening(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unigen_fast":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@single_op_cases
def test_same_bits_through_the_dispatcher(case: Case, device: torch.device) -> None:
    """Kernels are called past it where nobody listens there; who does listen sees every op, and the same numbers."""
    for size in ((3, 1), (40, 17)):
        tensors = make(case, *size, dtype=torch.float32, device=device)
        expected, expected_gradients, cotangents = value_and_gradients(case, tensors)
        with _Listening() as listening:
            got, gradients, _ = value_and_gradients(case, tensors, cotangents)
        for a, b in zip([*got, *gradients], [*expected, *expected_gradients], strict=True):
            assert_same_bits(a, b, f"size {size}")
        with recorded_ops() as calls:
            value_and_gradients(case, tensors, cotangents)
        assert listening.names == [name for name, _, _ in calls] != []


@both_nodes
def test_profiles_show_the_ops(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    with torch.profiler.profile() as profile:
        uf.iwae_loss(x, dim=1).backward()
    assert {"unigen_fast::iwae_loss", "unigen_fast::iwae_loss_backward"} <= {
        event.key for event in profile.key_averages()
    }


@both_nodes
@pytest.mark.parametrize("case", NEEDS_INPUT, ids=repr)
def test_changing_an_input_before_backward_is_noticed(case: Case, device: torch.device) -> None:
    tensors = make(case, 3, 4, device=device)
    copies = [x * 1 if x.requires_grad else x for x in tensors]
    outputs = as_tuple(case(*copies))
    with torch.no_grad():
        for x in copies:
            x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pull_back(outputs, leaves(tensors), cotangents_like(outputs))


@every_case
def test_same_bits_every_time(case: Case, device: torch.device) -> None:
    for size in ((300, 100), (3, 20000)) if case.every_size else ((50, 200),):
        tensors = make(case, *size, dtype=torch.float32, device=device)
        first, first_gradients, _ = value_and_gradients(case, tensors)
        second, second_gradients, _ = value_and_gradients(case, tensors)
        for a, b in zip([*first, *first_gradients], [*second, *second_gradients], strict=True):
            assert_same_bits(a, b)


@pytest.mark.skipif(not NATIVE["cpu"], reason="without kernels it is PyTorch that cuts the sums, by its thread count")
@every_case
def test_same_bits_with_one_and_two_threads(case: Case) -> None:
    sizes = ((2000, 100), (3, 70000)) if case.every_size and not case.composed else ((50, 200),)
    # 100 times for each kernel as it stands, without options
    runs = {size: 1 for size in sizes} | ({(40, 500): 100} if "[" not in case.name and not case.composed else {})
    threads = torch.get_num_threads()
    try:
        for size, count in runs.items():
            tensors = make(case, *size, dtype=torch.float32)
            outputs, gradients, cotangents = value_and_gradients(case, tensors)
            for torch_threads in (1, 2):
                torch.set_num_threads(torch_threads)
                for _ in range(count):
                    again, gradients_again, _ = value_and_gradients(case, tensors, cotangents)
                    for a, b in zip([*again, *gradients_again], [*outputs, *gradients], strict=True):
                        assert_same_bits(a, b, f"size {size}")
    finally:
        torch.set_num_threads(threads)


def flags_of_memory(address: int) -> list[str]:
    """Of the mapping around an address, as Linux shows them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is in no mapping")


@pytest.mark.skipif(not NATIVE["cpu"], reason="PyTorch allocates as it likes")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_large_results_ask_for_huge_pages() -> None:
    """A page fault for every 4 KiB takes longer than the kernels do."""
    x = torch.randn(3 << 20, requires_grad=True)
    value = uf.log_discriminator(x, y=1)
    (grad,) = torch.autograd.grad(value, x, torch.ones_like(value))
    of_dispatcher = torch.ops.unigen_fast.logit_term(x.detach(), 0, 1.0)
    for tensor in (value, grad, of_dispatcher):
        assert "hg" in flags_of_memory(tensor.data_ptr() + tensor.nbytes // 2)


@pytest.mark.skipif(not NATIVE["cpu"], reason="of the C++ kernels")
@pytest.mark.parametrize("shape", [(4352, 1024), (4352, 1023), (64, 200, 401)], ids=str)
def test_results_beyond_any_cache(shape: tuple[int, ...]) -> None:
    """Above 24 MiB they are written past the caches, unless they begin between two vectors. Halves are smaller."""
    mean, logvar = torch.randn(shape), 0.1 * torch.randn(shape)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        rows = [t.transpose(1, 2) if t.dim() == 3 else t for t in leaves]
        return torch.autograd.grad(uf.gaussian_kl(*rows, event_ndims=1, reduction="sum"), leaves)

    whole = gradients(mean, logvar)
    assert sum(g.nbytes for g in whole) > 24 << 20
    halves = zip(*(gradients(*pair) for pair in zip(mean.chunk(2), logvar.chunk(2), strict=True)), strict=True)
    for got, parts in zip(whole, halves, strict=True):
        assert_same_bits(got, torch.cat(parts))


@single_op_cases
def test_one_kernel_forward_and_one_backward(case: Case, device: torch.device) -> None:
    """The fused path is taken, once each way: no fall back to the reference goes unnoticed."""
    tensors = make(case, 3, 8, device=device)
    with recorded_ops() as calls:
        outputs, _, _ = value_and_gradients(case, tensors)
    names = [name for name, _, _ in calls]
    # gradients made along with a loss do for the loss alone
    backward = case.differentiable and not (OPS[names[0]].gradients and case.made and len(outputs) == 1)
    assert names[1:] == [f"{names[0]}_backward"] * backward, names


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@every_case
def test_no_host_synchronisation(case: Case, device: torch.device) -> None:
    tensors = make(case, 6, 40, dtype=torch.float32, device=device)
    _, _, cotangents = value_and_gradients(case, tensors)
    try:
        torch.cuda.set_sync_debug_mode("error")
        value_and_gradients(case.call, tensors, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launched(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result, and the names of the kernels that ran on the GPU; the memory's own operations are none."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return result, [event.name for event in events if not event.name.startswith(("Memcpy", "Memset"))]


@needs_cuda
@pytest.mark.parametrize(
    "case",
    # drawing a seed is PyTorch's kernel; pairs, classes of a minibatch and whole bounds take several
    [
        c
        for c in CASES
        if not (
            c.composed or c.random or c.name.startswith(("total_corr", "mmd", "iwae_objective")) or "groups" in c.name
        )
    ],
    ids=repr,
)
def test_one_launch_forward_and_one_backward(case: Case, device: torch.device) -> None:
    tensors = make(case, 6, 40, dtype=torch.float32, device=device)
    outputs, _, cotangents = value_and_gradients(case, tensors)  # warm: modules are loaded
    outputs, forward = launched(lambda: as_tuple(case.call(*tensors)))
    assert len(forward) == 1, forward
    if case.differentiable:
        _, backward = launched(lambda: pull_back(outputs, leaves(tensors), cotangents))
        assert len(backward) <= 1, backward


# ---- the rest of PyTorch ---------------------------------------------------------------------------------------------


def op_calls(case: Case, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, tuple[Any, ...]]]:
    """The bare ops that `case` runs, forward and backward, with arguments as leaves."""
    tensors = make(case, 3, 4, dtype=dtype, device=device)
    with recorded_ops() as calls:
        value_and_gradients(case, tensors)

    def leaf(x: Any) -> Any:
        if isinstance(x, list) and x and isinstance(x[0], Tensor):
            return [leaf(t) for t in x]
        if not isinstance(x, Tensor):
            return x
        return x.detach().requires_grad_(x.is_floating_point())

    return [(overload, tuple(leaf(a) for a in args)) for _, overload, args in calls]


@one_case_per_op
def test_opcheck(case: Case, device: torch.device) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch of every bare op, forward and backward."""
    for overload, args in op_calls(case, torch.float32, device):
        torch.library.opcheck(overload, args)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_of_schema_and_fake(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """The quick part of it, for every set of options: shapes, strides and dtypes of the fakes, mutation, aliasing."""
    for overload, args in op_calls(case, dtype, device):
        torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


def bare(case: Case, tensors: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    with recorded_ops() as calls:
        case(*tensors)
    return calls[0][1], calls[0][2]


@one_case_per_op
def test_bare_op_trains(case: Case, device: torch.device) -> None:
    """`torch.ops.unigen_fast.*`, as it stands in a graph: gradients, and their gradients."""
    tensors = make(case, 2, 3, device=device)
    overload, args = bare(case, tensors)
    name = overload._schema.name.partition("::")[2]
    if not hasattr(OPS[name], "backward"):
        assert not any(o.requires_grad for o in as_tuple(overload(*args)))
        return
    flat = list(args[0]) if OPS[name].tensor_list else [a for a in args if isinstance(a, Tensor)]
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in flat]

    def call(*xs: Tensor) -> tuple[Tensor, ...]:
        rest = iter(xs)
        arguments = (
            (list(xs), *args[1:])
            if OPS[name].tensor_list
            else [next(rest) if isinstance(a, Tensor) else a for a in args]
        )
        return as_tuple(overload(*arguments))[: OPS[name].differentiable_outputs]

    if case.derivative:
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)
    public = as_tuple(case(*tensors))[:1]
    cotangents = cotangents_like(public)
    # of a tensor that the output does not reach, the bare op's gradient is zeros
    expected = pull_back(public, leaves(tensors), cotangents, materialize_grads=True)
    found = pull_back(call(*inputs)[:1], leaves(inputs), cotangents, materialize_grads=True)
    for got, e in zip(found, expected, strict=True):
        assert_close(got, e, 1e-12, absolute=1e-30)


class Tagged(torch.Tensor):
    """A subclass that sees every PyTorch function."""


@every_case
def test_subclasses_go_to_the_reference(case: Case, device: torch.device) -> None:
    tensors = make(case, 3, 4, device=device)
    expected, expected_gradients, _ = value_and_gradients(case, tensors)
    tagged = [x.detach().as_subclass(Tagged).requires_grad_(x.requires_grad) for x in tensors]
    with recorded_ops() as calls:
        outputs, gradients, _ = value_and_gradients(case, tagged)
    assert calls == []
    assert all(type(o) is Tagged for o in outputs)
    for a, b in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert_close(a.as_subclass(Tensor), b, 1e-10, absolute=1e-14)


@single_op_cases
def test_parameters_are_no_subclass(case: Case, device: torch.device) -> None:
    tensors = make(case, 3, 4, device=device)
    parameters = [torch.nn.Parameter(x.detach()) if x.requires_grad else x for x in tensors]
    with recorded_ops() as calls:
        outputs, gradients, _ = value_and_gradients(case, parameters)
        assert calls
        expected, expected_gradients, _ = value_and_gradients(case, tensors)
    for a, b in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert_same_bits(a, b)


@every_case
def test_one_row_and_zero_dimensions(case: Case, device: torch.device) -> None:
    """A batch of 1 with an event of 1."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(case, make(case, 1, 1, dtype=dtype, device=device))


def test_scalar_tensors(device: torch.device) -> None:
    """0-dim tensors, where there is no dimension to reduce over."""
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: uf.importance_weighted_generator_loss(fake=x),
        lambda x: uf.generator_loss(fake=x),
        lambda x: uf.generator_loss(fake=x, reduction="none"),
        lambda x: uf.discriminator_loss(real=x, fake=x),
        lambda x: uf.log_ratio(x),
        lambda x: uf.gaussian_kl(x, x, event_ndims=0),
        lambda x: uf.bernoulli_log_prob(x, torch.ones_like(x), event_ndims=0),
        lambda x: uf.sample_gaussian(x, x),
    ]
    for call in calls:
        x = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
        torch.manual_seed(0)
        value = call(x)
        assert value.shape == ()
        (gradient,) = torch.autograd.grad(value, x)
        with reference_path():
            torch.manual_seed(0)
            expected = call(x)
            (expected_gradient,) = torch.autograd.grad(expected, x)
        assert_close(value, expected, 1e-12)
        assert_close(gradient, expected_gradient, 1e-12)


SEVERAL_INPUTS = [c for c in CASES if not c.composed and sum(s.differentiable for s in c.specs(2, 2)) > 1]


@pytest.mark.parametrize("case", SEVERAL_INPUTS, ids=repr)
def test_mixed_dtypes_are_promoted(case: Case, device: torch.device) -> None:
    """A float64 tensor among float32 ones: the result is float64, each gradient in its input's dtype."""
    tensors = make(case, 3, 5, dtype=torch.float32, device=device)
    last = max(i for i, x in enumerate(tensors) if x.requires_grad)
    mixed = [x.detach().double().requires_grad_() if i == last else x for i, x in enumerate(tensors)]
    outputs, gradients, _ = value_and_gradients(case, mixed)
    assert all(o.dtype == torch.float64 for o in outputs)
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves(mixed)]
    wide = upcast(mixed)
    expected, expected_gradients, _ = value_and_gradients(case, wide)
    for a, b in zip(outputs, expected, strict=True):
        assert_close(a, b, 1e-10)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert_close(a, b, 1e-6, absolute=1e-30)


def test_noise_comes_from_the_generator_as_documented(device: torch.device) -> None:
    """The table's oracle of the sampling cases draws the same state: two int64 of PyTorch's generator."""
    torch.manual_seed(3)
    state = draw_rng_state(device)
    torch.manual_seed(3)
    with recorded_ops() as calls:
        uf.sample_gaussian(torch.zeros(2, device=device), torch.zeros(2, device=device))
    assert torch.equal(calls[0][2][2], state)
    assert math.isfinite(float(state[0]))
