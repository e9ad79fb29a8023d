"""Compiles every Triton kernel ahead of time for sm_80, sm_90 and gfx942: no GPU needed.

    python benches/compile_triton.py [--target sm_90] [--kernel NAME] [--front-end] [--triton 3.6.0] [--processes 2]

The variants are those that the ops launch: each op runs on CPU tensors with its launches recorded instead of made;
every option in fp32, the main ones in the other dtypes. fp32 is compiled for every target, fp64 and bf16 for sm_90 and
fp16 for sm_80: a 16-bit number is an fp32 one after its load. Prints the most registers of each kernel and
every spill to memory; exits with 1 if a kernel does not compile, or spills.

What a release of Triton cannot compile, its front end mostly refuses: with --front-end that is all that each variant
goes through, but for one of each kernel, which is compiled whole. --triton takes a release, or "newest", for the
installed one: its wheel is downloaded into build/triton, and unpacked there.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("UNIGEN_FAST_DISABLE", "cuda,triton")  # nothing is run
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compile_triton_")

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.compiler import ASTSource

from unigen_fast.triton import OPS, _rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# dtypes of calls whose kernels are not compiled for a target
LEFT_OUT = {
    "sm_80": (torch.bfloat16, torch.float64),
    "sm_90": (torch.float16,),
    "gfx942": (torch.bfloat16, torch.float16, torch.float64),
}
INF = math.inf


# ---- what the ops launch ---------------------------------------------------------------------------------------------


def tensors(dtype: torch.dtype, *shape: int, count: int = 1) -> Any:
    made = [torch.empty(shape, dtype=dtype) for _ in range(count)]
    return made if count > 1 else made[0]


def importance_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # rows split among programs, rows that outgrow a tile, K first, K last
    shapes = (((8, 65536), 1), ((2048, 16384), 1), ((64, 4096), 0), ((4096, 64), 1))
    for shape, dim in shapes if dtype == torch.float32 else shapes[::3]:
        x = tensors(dtype, *shape)
        rows = shape[1 - dim]
        grad, scalar_grad, statistics = tensors(wide, rows), tensors(wide), tensors(wide, 3, rows)
        yield "log_mean_exp", x, dim
        yield "log_mean_exp_backward", grad, x, statistics[:2], dim
        yield "effective_sample_size", x, dim
        yield "importance_weights", x, dim, 2.0
        yield "importance_weights_backward", tensors(wide, *shape), x, tensors(wide, *shape), dim, 2.0
        for value in ("bound", "surrogate"):
            yield "iwae_loss", x, dim, "mean", value
        yield "iwae_loss_backward", scalar_grad, x, statistics[:2], dim, "mean", "bound"
        yield "importance_weighted_generator_loss", x, dim, 1.0, True, "mean"
        for detach in (True, False):
            options = (dim, 1.0, detach, "mean")
            yield "importance_weighted_generator_loss_backward", scalar_grad, x, statistics, *options


def estimator_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    full = dtype == torch.float32
    # rows that outgrow a tile, K first, K last
    shapes = (((2048, 16384), 1), ((1024, 64), 0), ((4096, 64), 1))
    for shape, dim in shapes if full else shapes[:1] if dtype == torch.float64 else shapes[2:]:
        x, y = tensors(dtype, *shape, count=2)
        rows = shape[1 - dim]
        grad, row_grad, statistics = tensors(wide), tensors(wide, rows), tensors(wide, 5, rows)
        two = statistics[:2]
        powers = [(0.5, 0.0), (0.3, 0.4)]
        if full and shape == (4096, 64):
            powers += [(0.0, 0.0), (-INF, 0.4)]
        for power, elbo_weight in powers if full else powers[1:]:
            options = (dim, power, elbo_weight, -1.0, "mean")
            yield "power_bound_loss", x, *options
            yield "power_bound_loss_backward", grad, x, two, *options
        yield "tvo_loss", x, dim, [0.0, 0.3, 1.0], "mean"
        yield "tvo_loss_backward", grad, x, statistics, dim, [0.0, 0.3, 1.0], "mean"
        yield "vimco_loss", x, y, dim, "mean"
        yield "vimco_loss_backward", grad, x, y, statistics, dim, "mean", 3
        yield "rws_losses", x, y, dim, "mean"
        yield "rws_losses_backward", grad, grad, x, y, two, dim, "mean", 3
        yield "log_variance_loss", x, dim, "mean"
        yield "log_variance_loss_backward", grad, x, two, dim, "mean"
        yield "importance_weighted_sum", x, y, dim, 2.0
        for needed in (2, 3):
            yield "importance_weighted_sum_backward", row_grad, x, y, row_grad, two, dim, 2.0, needed
        yield "weight_diagnostics", x, dim
    if dtype in (torch.float32, torch.float64):
        yield "pareto_shape", tensors(dtype, 4096, 14)


def adversarial_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    full = dtype == torch.float32
    for term in range(20 if full else 1):
        x = tensors(dtype, 64, 1024)
        yield "logit_term", x, term, 1.0
        yield "logit_term_backward", tensors(wide, 64, 1024), x, term, 1.0
    lists = ((64, 1, 0, 1), (100_000, 1, 0, 1), (100_000, 1, 3, 4), (100_000, 1, 2, 5), (800, 6, 0, 1), (8, 9, 0, 0))
    for size, reals, *terms in lists if full else lists[:2]:
        items = [tensors(dtype, size) for _ in range(2 * reals)]
        yield "logit_loss", items, reals, *terms, "mean", 1.0, False
        yield "logit_loss_backward", tensors(wide), items, reals, *terms, "mean", 1.0, False
        if reals == 1:
            yield "logit_loss", items, reals, *terms, "mean", 1.0, True
    for size, reals, coupling, *terms in (
        (64, 1, "averages", 0, 1),
        (100_000, 1, "averages", 0, 1),
        (800, 6, "averages", 9, 7),
        (100_000, 1, "ratios", 3, 4),
    ):
        if not full and size != 64:
            continue
        items = [tensors(dtype, size) for _ in range(2 * reals)]
        for stats in (False, True) if reals == 1 else (False,):
            yield "coupled_logit_loss", items, reals, coupling, *terms, "mean", 1.0, stats
        statistics = tensors(wide, 2 * reals, 6)
        yield (
            "coupled_logit_loss_backward",
            tensors(wide),
            items,
            statistics,
            reals,
            coupling,
            *terms,
            "mean",
            1.0,
            False,
        )
    fake, groups = tensors(dtype, 256), tensors(torch.int64, 256)
    for detach in (True, False) if full else (True,):
        yield "grouped_importance_weighted_generator_loss", fake, groups, 1.0, detach, "mean"
        statistics = tensors(wide, 513)
        options = (1.0, detach, "mean")
        yield "grouped_importance_weighted_generator_loss_backward", tensors(wide), fake, groups, statistics, *options


def divergence_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    full = dtype == torch.float32
    mean, logvar, prior_mean, prior_logvar = tensors(dtype, 4096, 64, count=4)
    weights, grad, scalar_grad, empty = tensors(wide, 4096), tensors(wide, 4096), tensors(wide), tensors(wide, 0)
    none, both, ends = (None, None), (prior_mean, prior_logvar), (-INF, INF)
    free = ((0.0, "sum", None), (0.5, "per_dim", None), (2.0, "sum", weights))
    combinations = [("logvar", ends, none, free[0]), ("std", (-30.0, 20.0), both, free[1])]
    if full:
        combinations += [(s, c, both, free[1]) for s in ("logvar", "logstd", "std") for c in (ends, (-30.0, 20.0))]
        combinations += [("logvar", ends, p, f) for p in (none, both, (prior_mean, None)) for f in free]
    for spread, clamp, priors, (free_bits, mode, w) in combinations:
        options = (1, spread, free_bits, mode, *clamp, 1.0, "mean")
        head = (mean, logvar, *priors, w)
        needed = 3 if priors == none else 7 if priors[1] is None else 15
        yield "gaussian_kl", *head, *options
        yield "gaussian_kl_backward", scalar_grad, *head, empty if w is None else grad, *options, needed
    plain = ("logvar", 0.0, "sum", *ends, 1.0, "none")
    few, few_spread = tensors(dtype, 4, 8, 64, 64, count=2)
    yield "gaussian_kl", few, few_spread, None, None, None, 3, *plain
    if full:
        yield "gaussian_kl", mean, logvar, None, None, None, 0, *plain
        swapped = [t.transpose(1, 2) for t in (few, few_spread)]  # several column dimensions
        yield "gaussian_kl", *swapped, few, few_spread, None, 3, *plain
        yield "gaussian_kl_backward", tensors(wide, 4), *swapped, few, few_spread, None, empty, 3, *plain, 15
    rng = torch.zeros(2, dtype=torch.int64)
    odd, odd_spread = tensors(dtype, 128, 10, count=2)
    samples = [(m, s, -1, 0, "logvar", ends) for m, s in ((mean, logvar), (odd, odd_spread))]
    if full:
        samples += [(m, s, 5, d, "logvar", ends) for m, s in ((mean, logvar), (odd, odd_spread)) for d in (0, 1)]
        samples += [(mean, logvar, -1, 0, "logstd", (-30.0, 20.0)), (mean, logvar, -1, 0, "std", ends)]
    for m, s, count, dim, spread, clamp in samples:
        z = tensors(dtype, *((*m.shape[:dim], 5, *m.shape[dim:]) if count > 0 else m.shape))
        yield "sample_gaussian", m, s, rng, count, dim, spread, *clamp
        yield "sample_gaussian_backward", z, m, s, rng, count, dim, spread, *clamp, 3
        options = (count, dim, 1, spread, *clamp)
        yield "sample_gaussian_with_kl", m, s, rng, *options
        yield "sample_gaussian_with_kl_backward", z, tensors(wide, m.size(0)), m, s, rng, *options, 3
    yield "sample_gaussian_with_kl", few, few_spread, rng, -1, 0, 3, "logvar", *ends


def likelihood_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = ((100, 50, 784), (16, 4, 65536))
    for shape in shapes if dtype == torch.float32 else shapes[:1]:
        logits = tensors(dtype, *shape)
        x = tensors(dtype, shape[0], 1, shape[2]).expand(shape)
        for event_ndims in (1, 0):
            yield "bernoulli_log_prob", logits, x, event_ndims
            grad = tensors(wide, *shape[: 3 - event_ndims])
            for needed in (1, 3):
                yield "bernoulli_log_prob_backward", grad, logits, x, event_ndims, needed


def pairwise_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    posterior = tensors(dtype, 1024, 64, count=3)
    grads, statistics = tensors(wide, 1024, count=6), tensors(wide, 66, 1024)
    for estimator in ("mss", "mws", "mss_columns") if dtype == torch.float32 else ("mss",):
        yield "total_correlation", *posterior, 50_000, estimator
        yield "total_correlation_backward", *grads, *posterior, statistics, 50_000, estimator, 7
    x, y = tensors(dtype, 1024, 64, count=2)
    for kernel in ("imq", "rbf") if dtype == torch.float32 else ("imq",):
        yield "mmd", x, y, kernel, [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0], True, 3


def categorical_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    full = dtype == torch.float32
    q, p = tensors(dtype, 16, 64, 32, 32, count=2)
    grad, rows, empty = tensors(wide), tensors(wide, 16, 64), tensors(wide, 0)
    for unimix, nats in ((0.01, (1.0, "sum")), (0.0, (1.0, "per_variable")))[: 2 if full else 1]:
        options = (1, *nats, unimix, 1.0, 0.1)
        yield "balanced_categorical_kl", q, p, *options
        kept = rows if nats[1] == "sum" else empty
        yield "balanced_categorical_kl_backward", grad, grad, grad, q, p, kept, *options, 3
    for prior in (None, p) if full else (None,):
        options = (3, 1, 0.0, 1.0, "mean")
        yield "categorical_kl", q, prior, None, *options
        yield "categorical_kl_backward", grad, q, prior, None, *options, 1 if prior is None else 3
    shapes = ((4096, 1000), (64, 20000)) if full else ((4096, 1000),)
    for shape in shapes:
        logits, x = tensors(dtype, *shape), torch.zeros(shape[0], dtype=torch.int64)
        yield "categorical_log_prob", logits, x, 1, 0, -100
        yield "categorical_log_prob_backward", tensors(wide, shape[0]), logits, x, 1, 0, -100
    for channels, numbers in ((3, 100), (1, 30)) if full else ((3, 100),):
        params, x = tensors(dtype, 16, 32, 32, numbers), tensors(dtype, 16, 32, 32, channels)
        yield "discretized_logistic_mixture_log_prob", params, x, 2
        for needed in (1, 3):
            yield "discretized_logistic_mixture_log_prob_backward", tensors(wide, 16), params, x, 2, needed


def formula_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, a, b, c, d = tensors(dtype, 128, 2000, count=5)
    rows, scalar_grad, weights, ends = tensors(wide, 128), tensors(wide), tensors(wide, 128), (-INF, INF)
    theta = tensors(dtype, 2000).expand(128, 2000)
    clamp = (-30.0, 20.0)
    listed: list[tuple[str, tuple[Any, ...], tuple[Any, ...], int]] = [
        ("gaussian_log_prob", (x, a, b), (1, "logvar", *ends), 6),
        ("gaussian_log_prob", (x, a, b), (1, "std", *clamp), 7),
        ("laplace_log_prob", (x, a, b), (1,), 6),
        ("discretized_logistic_log_prob", (x, a, b), (1, 1 / 255, -1.0, 1.0), 6),
        ("negative_binomial_log_prob", (x, a, theta), (1, 0.0), 6),
        ("negative_binomial_log_prob", (x, a, theta), (1, 1e-8), 7),
        ("zero_inflated_negative_binomial_log_prob", (x, a, theta, b), (1, 0.0), 14),
        ("zero_inflated_negative_binomial_log_prob", (x, a, theta, b), (1, 1e-8), 15),
        ("gaussian_kl_monte_carlo", (x, a, b, c, d, None), (1, "logvar", *ends, 1.0, "none"), 31),
        ("gaussian_kl_monte_carlo", (x, None, b, c, d, weights), (1, "logstd", *ends, 1.0, "mean"), 29),
        ("bernoulli_kl", (x, a, weights), (1, 1.0, "mean"), 3),
        ("bernoulli_kl", (x, None, None), (1, 1.0, "none"), 1),
    ]
    for name, inputs, options, needed in listed:
        yield name, *inputs, *options
        yield f"{name}_backward", scalar_grad if "mean" in options else rows, *inputs, *options, needed


# name, outputs of the decoder, options
LIKELIHOODS: list[tuple[str, int, list[float]]] = [
    ("bernoulli", 1, []),
    ("gaussian", 1, []),
    ("gaussian", 2, []),
    ("laplace", 2, []),
    ("discretized_logistic", 2, [1 / 255, -1.0, 1.0]),
    ("negative_binomial", 2, []),
    ("zero_inflated_negative_binomial", 3, []),
]


def elbo_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    full = dtype == torch.float32
    one = tensors(wide)
    # whole rows in a program, rows shared among programs, a long latent
    shapes = ((128, 784, 32), (16, 12288, 128), (1000, 4, 512))
    for (likelihood, count, bins), (rows, cols, latents) in itertools.product(LIKELIHOODS, shapes):
        every_option = full and likelihood == "bernoulli"
        if not every_option and (cols == 4 or (rows == 16 and count < 3)):
            continue
        mean, logvar = tensors(dtype, rows, latents, count=2)
        each, needed = tensors(wide, rows), (1 << count) - 1 | 24
        for shared in (False, True) if count > 1 and rows == 128 else (count > 1,):
            decoder = [tensors(dtype, rows, cols) for _ in range(count)] + [None] * (3 - count)
            if shared:
                decoder[1] = tensors(dtype, cols)
            head = (*decoder, decoder[0], mean, logvar)
            plain = (*head, None, None, None, 1, likelihood, bins, 0.5, 1.0, "mean")
            yield "elbo_loss", *plain, needed
            if full:
                yield "elbo_loss_backward", one, each, each, *plain, 0, needed
            if every_option:
                yield "elbo_loss", *plain, 0
                prior = (*head, mean, logvar, each, 1, likelihood, bins, 0.5, 1.0)
                yield "elbo_loss", *prior, "none", 0
                yield "elbo_loss", *prior, "sum", needed | 96
                yield "elbo_loss_backward", each, each, each, *prior, "none", 0, needed | 96


def objectives_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    full = dtype == torch.float32
    # a program per example, an example shared among programs, a long latent
    shapes = ((100, 50, 784, 50), (4, 5000, 784, 64), (256, 64, 32, 512))
    for (likelihood, count, bins), (examples, samples, cols, latents) in itertools.product(LIKELIHOODS, shapes):
        # the phases are alike but for the likelihood: all of them with one, and those of one call with the others
        every_phase = full and likelihood == "bernoulli"
        if not every_phase and (cols == 32 or (not full and (samples > 50 or count == 2))):
            continue
        decoder = [tensors(dtype, examples, samples, cols) for _ in range(count)] + [None] * (3 - count)
        if count > 1 and samples == 50:
            decoder[1] = tensors(dtype, cols)
        x, z = tensors(dtype, examples, cols), tensors(dtype, examples, samples, latents)
        mean, logvar = tensors(dtype, examples, latents, count=2)
        log_w, every = tensors(wide, examples, samples), (1 << count) - 1 | 56
        plain, prior = (None, None, 1, 1.0, 0.0, every), (mean, logvar, 2, 0.3, 0.4, every | 192)
        for prior_mean, prior_logvar, groups, power, elbo_weight, wanted in (
            (plain, prior) if every_phase else (plain,) if full else (prior,)
        ):
            head = (*decoder, x, z, mean, logvar, prior_mean, prior_logvar)
            options = (1, 1, likelihood, bins, groups, power, elbo_weight, -1.0, "mean")
            for gradients in (0, wanted) if every_phase else (wanted,):
                yield "multi_sample_bound", *head, *options, gradients
            if every_phase or samples == 50:
                yield "multi_sample_bound_backward", tensors(wide), log_w, *head, log_w, log_w, *options, 0, wanted


# kernel, its specialisation, and the dtype of the first call that launches it
Variant = tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any], dict[str, int], torch.dtype]


class NoDevice:
    """A driver that says what the runtime asks for before it compiles; the target changes nothing there."""

    def get_current_target(self) -> GPUTarget:
        return TARGETS["sm_90"]


def variants() -> list[Variant]:
    """Every distinct specialisation, as the runtime itself derives it from a launch's arguments."""
    found: dict[str, Variant] = {}
    backend = triton.compiler.make_backend(TARGETS["sm_90"])

    def record(kernel: Any, grid: Any, device: Any, *args: Any, **constants: Any) -> None:
        binder = kernel.device_caches[0][-1]
        chosen = {name: constants.pop(name) for name in ("num_warps", "maxnreg") if name in constants}
        options = {**chosen, "debug": False}
        bound = binder(*args, **constants, **options)
        key = f"{kernel.fn.__module__} {kernel.fn.__name__} {bound[1]} {chosen}"
        if key not in found:
            _, signature, folded, attributes = kernel._pack_args(backend, options, *bound)
            found[key] = (kernel, signature, folded, attributes, chosen, dtype)

    triton.runtime.driver.set_active(NoDevice())
    launch, _rows.launch = _rows.launch, record
    calls: tuple[Callable[..., Any], ...] = (
        importance_calls,
        estimator_calls,
        adversarial_calls,
        divergence_calls,
        likelihood_calls,
        pairwise_calls,
        categorical_calls,
        formula_calls,
        elbo_calls,
        objectives_calls,
    )
    # fp32 first: what others launch too, of statistics, is compiled for every target
    for dtype, family in itertools.product((torch.float32, torch.bfloat16, torch.float16, torch.float64), calls):
        for name, *args in family(dtype):
            OPS[name](*args)
    _rows.launch = launch
    return list(found.values())


# ---- compiling them --------------------------------------------------------------------------------------------------


def resources(compiled: Any, target: GPUTarget) -> tuple[int, int]:
    """(registers per thread, bytes or registers spilled to memory)."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]  # scalar registers spill into lanes of vector registers
        spills = [int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)]
        return int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)), sum(spills)  # type: ignore[union-attr]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)  # type: ignore[union-attr]
        command = [get_ptxas(target.arch).path, "-v", f"-arch={architecture}", ptx.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    return int(re.search(r"Used (\d+) registers", log).group(1)), sum(spills)  # type: ignore[union-attr]


def no_cubin(*_: Any) -> bytes:
    """In place of Triton's own run of ptxas: `resources` has one, which says what a kernel needs."""
    return b""


def run_front_end(source: Any, target: GPUTarget, chosen: dict[str, int]) -> None:
    """What `triton.compile` does before it optimizes."""
    backend = triton.compiler.make_backend(target)
    options = backend.parse_options(dict(chosen))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def compile_one(job: tuple[int, str, bool]) -> tuple[str, str, int, int, str]:
    """(kernel, target, registers, spills, error) of a variant, a target, and whether it is compiled whole."""
    number, target_name, whole = job
    kernel, signature, constants, attributes, chosen, _ = VARIANTS[number]
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    target = TARGETS[target_name]
    registers = spills = 0
    try:
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        if whole:
            registers, spills = resources(triton.compile(source, target=target, options=chosen), target)
        else:
            run_front_end(source, target, chosen)
    except Exception as error:  # any failure is one to report, and the others go on
        return name, target_name, 0, 0, f"{type(error).__name__}: {error}"[:2000]
    detail = f"{signature} {constants}" if spills else ""
    return name, target_name, registers, spills, detail


def run_under(release: str, arguments: list[str]) -> NoReturn:
    """Starts this program again, under another release of Triton."""
    folder = Path(__file__).parents[1] / "build" / "triton"
    requirement = "triton" if release == "newest" else f"triton=={release}"
    pip = (sys.executable, "-m", "pip")
    command = (*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement)
    downloaded = subprocess.run(command, capture_output=True, text=True)
    names = re.findall(r"triton-\S+?\.whl", downloaded.stdout)
    if downloaded.returncode or not names:
        sys.exit(f"could not download {requirement} for this Python:\n{downloaded.stdout}{downloaded.stderr}")
    unpacked = folder / names[-1].removesuffix(".whl")
    if not unpacked.exists():
        command = (*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(unpacked), str(folder / names[-1]))
        subprocess.run(command, check=True)
    path = os.pathsep.join(filter(None, (str(unpacked), os.environ.get("PYTHONPATH"))))
    os.execve(sys.executable, [sys.executable, __file__, *arguments], {**os.environ, "PYTHONPATH": path})


def main() -> int:
    other = argparse.ArgumentParser(add_help=False)
    other.add_argument("--triton", metavar="RELEASE", help='such as 3.6.0, or "newest"; default: the one installed')
    release, arguments = other.parse_known_args()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[other]
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--front-end", action="store_true", help="of every variant; one of each kernel whole")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if release.triton:
        run_under(release.triton, arguments)
    VARIANTS.extend(variants())
    jobs: list[tuple[int, str, bool]] = []
    begun: set[tuple[Any, str]] = set()
    for target, (i, variant) in itertools.product(options.target or TARGETS, enumerate(VARIANTS)):
        kernel, dtype = variant[0], variant[-1]
        if options.kernel in kernel.fn.__name__ and (options.front_end or dtype not in LEFT_OUT[target]):
            jobs.append((i, target, not options.front_end or (kernel, target) not in begun))
            begun.add((kernel, target))
    CUDABackend.make_cubin = no_cubin
    rows: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    failed = 0
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        for name, target, registers, spills, detail in pool.imap_unordered(compile_one, jobs, chunksize=4):
            if detail:
                failed += 1
                verdict = f"{registers} registers, {spills} spilled" if spills else "FAILED"
                print(f"{name} {target} {verdict}: {detail}", flush=True)
            rows[name, target].append((registers, spills))
    print(f"{'kernel':<48} {'target':<7} {'variants':>8} {'registers':>9} {'spills':>6}")
    for (name, target), found in sorted(rows.items()):
        print(f"{name:<48} {target:<7} {len(found):>8} {max(found)[0]:>9} {sum(s for _, s in found):>6}")
    count = sum(whole for _, _, whole in jobs)
    print(f"Triton {triton.__version__}: {count} compilations and {len(jobs) - count} front ends", end=", ")
    print(f"{failed} failed or spilled")
    return 1 if failed else 0


VARIANTS: list[Variant] = []  # the processes inherit them

if __name__ == "__main__":
    sys.exit(main())
