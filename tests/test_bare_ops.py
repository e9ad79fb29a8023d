"""`torch.ops.unigen_fast.*`, as graphs hold them: autograd as of PyTorch's own ops, any strides, and no crash."""

import gc
import math
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from helpers import (
    OPS,
    as_tuple,
    assert_close,
    leaves,
    make,
)
from test_fused import ONE_PER_OP, bare
from torch import Tensor

import unigen_fast as uf

# a case for each op that has a gradient
TRAINED = [case for case in ONE_PER_OP if case.differentiable]
trained_cases = pytest.mark.parametrize("case", TRAINED, ids=repr)


def call_of(case: Case) -> tuple[Callable[..., Tensor], list[Tensor], int]:
    """The bare op of a case as a function of its tensors, which require grad as those of the case do; and how many of
    its outputs carry gradient."""
    tensors = make(case, 3, 4)
    overload, args = bare(case, tensors)
    op = OPS[overload._schema.name.partition("::")[2]]
    flat = list(args[0]) if op.tensor_list else [a for a in args if isinstance(a, Tensor)]
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in flat]

    def call(*xs: Tensor) -> Any:
        rest = iter(xs)
        if op.tensor_list:
            return overload(list(xs), *args[1:])
        return overload(*(next(rest) if isinstance(a, Tensor) else a for a in args))

    return call, inputs, op.differentiable_outputs


def loss_of(outputs: Any) -> Tensor:
    """Weighted: a plain sum of weights that sum to 1 has no gradient. The weights are all that it saves."""
    weighted = [o * torch.linspace(0.5, 1.5, o.numel()).reshape(o.shape) for o in as_tuple(outputs) if o.requires_grad]
    return sum(o.sum() for o in weighted)


def softmax_case() -> tuple[Callable[..., Tensor], list[Tensor], int]:
    return lambda x: torch.softmax(x, -1), [torch.randn(3, 4, requires_grad=True)], 1


# PyTorch's own op goes the same way: what is asked for here is no more than it gives
OF_OPS = pytest.mark.parametrize(
    "made",
    [softmax_case, *((lambda case=case: call_of(case)) for case in TRAINED)],
    ids=["softmax", *map(repr, TRAINED)],
)


@OF_OPS
def test_only_results_with_a_gradient_require_it(made: Callable[..., Any]) -> None:
    call, inputs, count = made()
    outputs = as_tuple(call(*inputs))
    assert any(o.requires_grad for o in outputs[:count]) and not any(o.requires_grad for o in outputs[count:])


@OF_OPS
def test_a_tensor_changed_in_place_is_noticed(made: Callable[..., Any]) -> None:
    """softmax needs its output alone, and so do a few ops: then the output is the tensor that is changed."""
    call, inputs, _ = made()
    copies = [x * 1 if x.requires_grad else x for x in inputs]
    outputs = as_tuple(call(*copies))
    with torch.no_grad():
        for x in (*copies, *outputs):
            if x.is_floating_point():
                x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(outputs).backward()


@OF_OPS
def test_a_second_backward_pass_finds_the_graph_freed(made: Callable[..., Any]) -> None:
    call, inputs, _ = made()
    outputs = as_tuple(call(*inputs))
    pairs = [(o, torch.ones_like(o)) for o in outputs if o.requires_grad]
    arguments = [o for o, _ in pairs], leaves(inputs), [g for _, g in pairs]
    torch.autograd.grad(*arguments, allow_unused=True)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(*arguments, allow_unused=True)


@OF_OPS
def test_hooks_see_what_is_saved(made: Callable[..., Any]) -> None:
    call, inputs, _ = made()
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or len(packed) - 1, lambda i: packed[i]):
        outputs = call(*inputs)
    assert packed
    expected = torch.autograd.grad(loss_of(call(*inputs)), leaves(inputs), allow_unused=True)
    for got, e in zip(torch.autograd.grad(loss_of(outputs), leaves(inputs), allow_unused=True), expected, strict=True):
        assert (got is None and e is None) or torch.equal(got, e)


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@OF_OPS
def test_no_result_outlives_its_graph(made: Callable[..., Any]) -> None:
    """A cycle from an output through its node would keep memory until the cyclic collector runs."""
    call, inputs, _ = made()
    with without_collector():
        outputs = as_tuple(call(*inputs))
        alive = [weakref.ref(o) for o in outputs]
        loss_of(outputs).backward()
        del outputs
        assert [r() for r in alive] == [None] * len(alive)


@pytest.mark.parametrize("n", [(3, 4), (4400, 8)], ids=["few", "many"])
@trained_cases
def test_a_change_behind_a_compiled_loss_is_noticed(case: Case, n: tuple[int, int]) -> None:
    """As in eager mode: on both sides of the size from which a graph holds the op itself."""
    if n[0] > 1000 and case.function in ("total_correlation", "mmd"):
        n = (120, 60)  # of pairs of rows; a graph holds the op at any size
    tensors = make(case, *n, dtype=torch.float32, layout="contiguous")

    def step(*xs: Tensor) -> Tensor:
        copies = [x * 1.0 if x.requires_grad else x for x in xs]
        loss = loss_of(case.call(*copies))
        for copy, x in zip(copies, xs, strict=True):
            if x.requires_grad:
                copy.mul_(2)
        return loss + 0 * sum(copy.sum() for copy, x in zip(copies, xs, strict=True) if x.requires_grad)

    def outcome(function: Callable[..., Tensor]) -> list[Tensor] | None:
        torch.manual_seed(0)
        try:
            return list(torch.autograd.grad(function(*tensors), leaves(tensors)))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return None

    torch._dynamo.reset()
    eager, compiled = outcome(step), outcome(torch.compile(step, backend="aot_eager", fullgraph=True))
    # gradients that need no input (a linear loss, weights) are right all the same
    if compiled is not None:
        torch.manual_seed(0)
        plain = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        right = torch.autograd.grad(loss_of(case.call(*plain)), leaves(plain))
        for got, e in zip(compiled, right, strict=True):
            assert_close(got, e, 1e-5, absolute=1e-12)
    else:
        assert eager is None or case.made


# ---- any strides, any number of dimensions ---------------------------------------------------------------------------


def random_layout(x: Tensor, rng: random.Random) -> Tensor:
    """The same numbers in an order of dimensions, with steps and gaps, of its own."""
    order = rng.sample(range(x.dim()), x.dim())
    steps = [rng.choice((1, 1, 2)) for _ in order]
    large = torch.full([x.size(d) * s + rng.choice((0, 1)) for d, s in zip(order, steps, strict=True)], math.nan)
    large = large.to(x.dtype)[tuple(slice(0, x.size(d) * s, s) for d, s in zip(order, steps, strict=True))]
    view = large.permute([order.index(d) for d in range(x.dim())])
    view.copy_(x)
    if x.dim() and rng.random() < 0.3:  # broadcast along one dimension
        d = rng.randrange(x.dim())
        view = view.narrow(d, 0, 1).expand_as(view) if x.size(d) else view
    return view


def ranked(ndim: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choice((1, 2, 2, 3)) for _ in range(ndim))


def of_any_rank(rng: random.Random) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """name -> call of tensors of up to 7 dimensions, and these."""
    ndim = rng.randrange(1, 8)
    shape = ranked(ndim, rng)
    event = rng.randrange(0, ndim + 1)
    dim = rng.randrange(ndim)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64)

    a, b, c, d = (normal(*shape) for _ in range(4))
    rows = normal(*shape[: ndim - event]).square()
    positive = [t.abs() + 0.3 for t in (a, b, c)]
    classes = rng.randrange(ndim + 1)
    logits = [normal(*shape[:classes], 4, *shape[classes:]) for _ in range(2)]
    labels = torch.randint(0, 4, shape)
    latent = [normal(*shape[: ndim - event], 2) for _ in range(3)]
    found: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "gaussian_kl": (lambda *t: uf.gaussian_kl(*t[:4], event_ndims=event, weights=t[4]), [a, b, c, d, rows]),
        "gaussian_kl rows": (lambda *t: uf.gaussian_kl(*t, event_ndims=event, reduction="none"), [a, b]),
        "gaussian_kl_monte_carlo": (lambda *t: uf.gaussian_kl_monte_carlo(*t, event_ndims=event), [a, b, c, d, b]),
        "bernoulli_kl": (lambda *t: uf.bernoulli_kl(*t, event_ndims=event), [a, b]),
        "bernoulli_log_prob": (lambda *t: uf.bernoulli_log_prob(*t, event_ndims=event), [a, b.sigmoid()]),
        "gaussian_log_prob": (lambda *t: uf.gaussian_log_prob(*t, event_ndims=event), [a, b, c]),
        "negative_binomial": (lambda *t: uf.negative_binomial_log_prob(*t, event_ndims=event), positive),
        "log_mean_exp": (lambda t: uf.log_mean_exp(t, dim=dim), [a]),
        "importance_weights": (lambda t: uf.importance_weights(t, dim=dim, detach=False), [a]),
        "iwae_loss": (lambda t: uf.iwae_loss(t, dim=dim), [a]),
        "tvo_loss": (lambda t: uf.tvo_loss(t, dim=dim, partition=[0, 0.3, 1]), [a]),
        "rws_losses": (lambda *t: uf.rws_losses(*t, dim=dim), [a, b]),
        "discriminator_loss": (lambda *t: uf.discriminator_loss(real=t[0], fake=t[1]), [a, b]),
        "log_discriminator": (lambda t: uf.log_discriminator(t, 1), [a]),
        "iwgan": (lambda t: uf.importance_weighted_generator_loss(fake=t, dim=dim), [a]),
        "categorical_kl": (
            lambda *t: uf.categorical_kl(*t, class_dim=classes, event_ndims=event, reduction="none"), logits,
        ),
        "categorical_log_prob": (
            lambda t: uf.categorical_log_prob(t, labels, class_dim=classes, event_ndims=event), logits[:1],
        ),
        "elbo_loss": (
            lambda *t: uf.elbo_loss(t[0], t[1].sigmoid(), t[2], t[3], event_ndims=event, reduction="none"),
            [a, b, *latent[:2]],
        ),
    }  # fmt: skip
    if event and shape:
        s = rng.randrange(ndim - event + 1)
        decoder = normal(*shape[: ndim - event][:s], 3, *shape[: ndim - event][s:], *shape[ndim - event :])
        z = normal(*shape[: ndim - event][:s], 3, *shape[: ndim - event][s:], 2)
        found["iwae_objective"] = (
            lambda *t: uf.iwae_objective(t[0], t[1].sigmoid(), *t[2:], dim=s, event_ndims=event),
            [decoder, b, z, *latent[:2]],
        )  # fmt: skip
    return found


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts_of_up_to_seven_dimensions(seed: int) -> None:
    """Value and gradient are those of contiguous tensors; so are they where the gradient comes in any layout."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        for name, (call, tensors) in of_any_rank(rng).items():
            laid_out = [random_layout(x, rng).requires_grad_() for x in tensors]
            plain = [x.detach().contiguous().clone().requires_grad_() for x in laid_out]
            outputs = [o for o in as_tuple(call(*laid_out)) if o.requires_grad]
            expected = [o for o in as_tuple(call(*plain)) if o.requires_grad]
            cotangents = [random_layout(torch.randn_like(o), rng) for o in outputs]
            got = torch.autograd.grad(outputs, laid_out, cotangents, allow_unused=True)
            right = torch.autograd.grad(expected, plain, cotangents, allow_unused=True)
            for o, e in zip([*outputs, *got], [*expected, *right], strict=True):
                if o is not None or e is not None:
                    assert_close(o, e, 1e-11, absolute=1e-13, what=f"{name} {[tuple(x.stride()) for x in laid_out]}")


def test_a_gradient_in_another_order_of_dimensions() -> None:
    """The strides of what reaches backward are those of the user's next layer."""
    x = torch.randn(2, 3, 4, 5, 6, 7, requires_grad=True)

    def gradient(order: tuple[int, ...]) -> Tensor:
        torch.manual_seed(0)
        z = uf.sample_gaussian(x, x * 0.1)
        return torch.autograd.grad((z.permute(order).contiguous() ** 2).sum(), x)[0]

    assert_close(gradient((5, 4, 3, 2, 1, 0)), gradient((0, 1, 2, 3, 4, 5)), 1e-6)


# ---- malformed calls -------------------------------------------------------------------------------------------------

MALFORMED = Path(__file__).with_name("malformed.py")


def test_malformed_calls_raise() -> None:
    """In a process of their own: the first one that is not refused may be the end of it."""
    done = subprocess.run([sys.executable, str(MALFORMED)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert re.search(r"^(\d+) malformed calls, each refused", done.stdout, re.MULTILINE), done.stdout
