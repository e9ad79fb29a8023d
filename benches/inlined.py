"""In a graph of `torch.compile`: our kernels, or the references' PyTorch left to the compiler?

    python benches/inlined.py --json benches/results/inlined.json
    python benches/inlined.py --ops gaussian_kl,logistic --device cuda

Each op stands in a small graph of its own, its inputs being the outcome of a product, and runs forward and backward:
once as a kernel (`inline_below` 0), once as the reference, which the compiler fuses with that product. Guards are
skipped, and both take turns. What is printed is how many times longer the step with the kernels takes; `inline_below`
in `unigen_fast/_ops.py` is chosen by this, for the CPU.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unigen_fast as uf
from unigen_fast import _ops
from unigen_fast.bench import harness, new_record

COLUMNS = 64
SIZES = (2**10, 2**12, 2**14, 2**16, 2**18)  # of x


def _ones(x: Tensor) -> Tensor:
    return torch.ones_like(x)


# of x `[rows, 64]`, the op under test, and how many tensors of that shape it takes
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], str, int]] = {
    "log_mean_exp": (lambda x: uf.log_mean_exp(x, dim=1).sum(), "log_mean_exp", 1),
    "importance_weights": (
        lambda x: (uf.importance_weights(x, dim=1, detach=False) * x).sum(), "importance_weights", 1,
    ),
    "effective_sample_size": (
        lambda x: x.sum() + uf.effective_sample_size(x, dim=1).sum(), "effective_sample_size", 1,
    ),
    "iwae_loss": (lambda x: uf.iwae_loss(x, dim=1), "iwae_loss", 1),
    "renyi_loss": (lambda x: uf.renyi_loss(x, dim=1, alpha=0.5), "power_bound_loss", 1),
    "tvo_loss": (lambda x: uf.tvo_loss(x, dim=1, partition=(0.0, 0.5, 1.0)), "tvo_loss", 1),
    "vimco_loss": (lambda x: uf.vimco_loss(x, 2 * x, dim=1), "vimco_loss", 2),
    "rws_losses": (lambda x: sum(uf.rws_losses(x, 2 * x, dim=1)), "rws_losses", 2),
    "log_variance_loss": (lambda x: uf.log_variance_loss(x, dim=1), "log_variance_loss", 1),
    "importance_weighted_sum": (
        lambda x: uf.importance_weighted_sum(x, 2 * x, dim=1).sum(), "importance_weighted_sum", 2,
    ),
    "iwgan": (
        lambda x: uf.importance_weighted_generator_loss(fake=x), "importance_weighted_generator_loss", 1,
    ),
    "logistic": (lambda x: uf.discriminator_loss(real=x, fake=2 * x), "logit_loss", 2),
    "hinge": (lambda x: uf.discriminator_loss(real=x, fake=2 * x, kind="hinge"), "logit_loss", 2),
    "relativistic_average": (
        lambda x: uf.discriminator_loss(real=x, fake=2 * x, kind="relativistic_average"), "coupled_logit_loss", 2,
    ),
    "gaussian_kl": (lambda x: uf.gaussian_kl(x, 0.5 * x), "gaussian_kl", 2),
    "gaussian_kl_monte_carlo": (
        lambda x: uf.gaussian_kl_monte_carlo(x, 2 * x, x, 3 * x, x), "gaussian_kl_monte_carlo", 5,
    ),
    "bernoulli_kl": (lambda x: uf.bernoulli_kl(x, 2 * x), "bernoulli_kl", 2),
    "bernoulli_log_prob": (lambda x: uf.bernoulli_log_prob(x, _ones(x)).mean(), "bernoulli_log_prob", 2),
    "gaussian_log_prob": (lambda x: uf.gaussian_log_prob(_ones(x), x, 0.5 * x).mean(), "gaussian_log_prob", 3),
    "laplace_log_prob": (lambda x: uf.laplace_log_prob(_ones(x), x, 0.5 * x).mean(), "laplace_log_prob", 3),
    "discretized_logistic_log_prob": (
        lambda x: uf.discretized_logistic_log_prob(0 * x.detach(), x, 0.5 * x, bin_width=1 / 255).mean(),
        "discretized_logistic_log_prob", 3,
    ),
    "categorical_kl": (lambda x: uf.categorical_kl(x, 2 * x), "categorical_kl", 2),
    "balanced_categorical_kl": (
        lambda x: uf.balanced_categorical_kl(x.unflatten(1, (4, 16)), 2 * x.unflatten(1, (4, 16))).loss,
        "balanced_categorical_kl", 2,
    ),
    "elbo_loss": (lambda x: uf.elbo_loss(x, _ones(x), 2 * x, 0.5 * x).loss, "elbo_loss", 4),
}  # fmt: skip


def step(call: Callable[[Tensor], Tensor], op: str, below: float, x: Tensor) -> Callable[[], None]:
    """Compiled with that `inline_below`, and warm."""
    factor = torch.ones((), device=x.device, requires_grad=True)

    def graph(x: Tensor, factor: Tensor) -> Tensor:
        return call(x * factor)

    graph.__code__ = graph.__code__.replace()  # of its own: by it the compiler finds what it has made
    no_guards = {"guard_filter_fn": lambda guards: [False] * len(guards)}  # there is nothing but this call
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, options=no_guards)

    def run() -> None:
        factor.grad = None
        compiled(x, factor).backward()

    kept, _ops.__dict__[op].inline_below = _ops.__dict__[op].inline_below, below
    try:
        for _ in range(10):
            run()
    finally:
        _ops.__dict__[op].inline_below = kept
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", help="comma-separated names of the calls")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--seconds", default=1.0, type=float, help="for each size of each call")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    harness.keep_freed_memory()
    names = arguments.ops.split(",") if arguments.ops else list(CALLS)
    rows: dict[str, list[dict[str, Any]]] = {}
    print(f"kernel / reference; elements of x: {', '.join(map(str, SIZES))}")
    for name in names:
        call, op, tensors = CALLS[name]
        rows[name] = []
        for elements in SIZES:
            torch._dynamo.reset()
            x = torch.randn(elements // COLUMNS, COLUMNS, device=arguments.device)
            steps = {how: step(call, op, below, x) for how, below in (("kernel", 0), ("reference", float("inf")))}
            figures = harness.time_steps(steps, arguments.device, arguments.seconds)
            seconds = {how: found["seconds"] for how, found in figures.items()}
            rows[name].append({"elements": tensors * elements} | seconds)
        ratios = "  ".join(f"{r['elements']:8}: {r['kernel'] / r['reference']:5.2f}" for r in rows[name])
        print(f"{name:30} {ratios}", flush=True)
    if arguments.json:
        record = new_record(arguments.device, arguments.seconds)
        for empty in ("rows", "steps", "copy_bandwidth"):
            del record[empty]
        arguments.json.write_text(json.dumps(record | {"calls": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
