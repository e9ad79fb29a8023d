"""The CUDA kernels' logic without a GPU: csrc/cuda/*.cu, compiled by g++ against tests/cuda_emulation, on small grids.

Every kernel, in every direction and width of access, split and whole rows, against the references. What only a GPU can
show (speed, real races, its own exponentials) is not here.
"""

import ctypes
import hashlib
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unigen_fast.reference import adversarial, categorical, divergence, importance, likelihood, objectives, pairwise

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-w"]
FLAGS += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/kernels/problem.h
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# one multiprocessor: whole rows, few lanes; many: rows are split over blocks
MULTIPROCESSORS = (1, 100)
MAX_DIMS = 4
INF, NAN = math.inf, math.nan

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux"
)


def _build(folder: pathlib.Path) -> pathlib.Path:
    emulation = ROOT / "tests" / "cuda_emulation"
    command = ["g++", *FLAGS, f"-I{emulation}", f"-I{ROOT / 'csrc'}"]
    objects, running = [], []
    for unit in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        entries = [] if objects else ["-DUNIGEN_EMULATION_ENTRIES"]
        objects.append(str(folder / f"{unit.stem}.o"))
        define = f'-DUNIT="cuda/{unit.name}"'
        running.append(
            subprocess.Popen([*command, define, *entries, "-c", str(emulation / "kernels.cpp"), "-o", objects[-1]])
        )
    assert all(process.wait() == 0 for process in running)
    library = folder / "emulation.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    """The library, built once for each state of its sources."""
    sources = [*sorted((ROOT / "csrc").rglob("*.[hc]*")), *sorted((ROOT / "tests" / "cuda_emulation").iterdir())]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + " ".join(FLAGS).encode()).hexdigest()[:16]
    cache = pathlib.Path(tempfile.gettempdir()) / f"unigen_fast_emulation_{os.getuid()}_{digest}"
    library = cache / "emulation.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            built = _build(pathlib.Path(folder))
            cache.mkdir(exist_ok=True)
            shutil.copy(built, cache / "new.so")
            os.replace(cache / "new.so", library)
    loaded = ctypes.CDLL(str(library))
    assert loaded.max_dims() == MAX_DIMS
    return loaded


# ---- csrc/kernels.h in ctypes ----------------------------------------------------------------------------------------

_Dims = ctypes.c_int64 * MAX_DIMS


class Grid(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_dims", ctypes.c_int),
        ("col_dims", ctypes.c_int),
        ("row_size", _Dims),
        ("col_size", _Dims),
    ]


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row", _Dims), ("col", _Dims)]


class Reduction(ctypes.Structure):
    _fields_ = [("reduce", ctypes.c_bool), ("scale", ctypes.c_double), ("denominator", ctypes.c_double)]


class Vectors(ctypes.Structure):
    """An operand with a dimension more than the grid."""

    _fields_ = [("at", Operand), ("step", ctypes.c_int64)]


class Unimix(ctypes.Structure):
    _fields_ = [("keep", ctypes.c_double), ("floor", ctypes.c_double)]


class Spread(ctypes.Structure):
    _fields_ = [("spread", ctypes.c_int), ("clamp_min", ctypes.c_double), ("clamp_max", ctypes.c_double)]


def _arguments(name: str, **fields: Any) -> type[ctypes.Structure]:
    listed = [("grid", Grid), ("dtype", ctypes.c_int), *fields.items()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


INT, LONG, DOUBLE, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
WeightRows = _arguments(
    "WeightRows", log_w=Operand, value=Operand, statistics=Operand, kind=INT, temperature=DOUBLE, reduction=Reduction
)
WeightRowsBackward = _arguments(
    "WeightRowsBackward",
    grad=Operand,
    log_w=Operand,
    statistics=Operand,
    grad_log_w=Operand,
    kind=INT,
    temperature=DOUBLE,
    detach=ctypes.c_bool,
    reduction=Reduction,
)
Weights = _arguments("Weights", log_w=Operand, weights=Operand, temperature=DOUBLE)
WeightsBackward = _arguments("WeightsBackward", grad=Operand, weights=Operand, grad_log_w=Operand, temperature=DOUBLE)
_ESTIMATOR_OPTIONS = {
    "kind": INT,
    "power": DOUBLE,
    "elbo_weight": DOUBLE,
    "temperature": DOUBLE,
    "partition": ctypes.POINTER(DOUBLE),
    "points": INT,
    "reduction": Reduction,
}
Estimators = _arguments(
    "Estimators", **dict.fromkeys(("in0", "in1", "value0", "value1", "statistics"), Operand), **_ESTIMATOR_OPTIONS
)
EstimatorsBackward = _arguments(
    "EstimatorsBackward",
    **dict.fromkeys(("grad0", "grad1", "in0", "in1", "value", "statistics", "out0", "out1"), Operand),
    **_ESTIMATOR_OPTIONS,
)
LogitItem = _arguments("LogitItem", logits=Operand, grad_logits=Operand, term=INT, count=DOUBLE)
LogitTerm = _arguments("LogitTerm", logits=Operand, out=Operand, term=INT, scale=DOUBLE)
LogitTermBackward = _arguments(
    "LogitTermBackward", grad=Operand, logits=Operand, grad_logits=Operand, term=INT, scale=DOUBLE
)


class LogitLoss(ctypes.Structure):
    _fields_ = [
        ("items", ctypes.POINTER(LogitItem)),
        ("num_items", LONG),
        ("dtype", INT),
        ("scale", DOUBLE),
        ("value", POINTER),
        ("statistics", POINTER),
    ]


class LogitLossBackward(ctypes.Structure):
    _fields_ = [
        ("items", ctypes.POINTER(LogitItem)),
        ("num_items", LONG),
        ("dtype", INT),
        ("scale", DOUBLE),
        ("grad", POINTER),
    ]


class CoupledLogitLoss(LogitLoss):
    _fields_ = [("reals", LONG), ("coupling", INT), ("return_stats", ctypes.c_bool)]


class CoupledLogitLossBackward(LogitLossBackward):
    _fields_ = [("reals", LONG), ("coupling", INT), ("statistics", POINTER)]


GroupedWeights = _arguments(
    "GroupedWeights",
    logits=Operand,
    labels=Operand,
    temperature=DOUBLE,
    mean=ctypes.c_bool,
    value=POINTER,
    statistics=POINTER,
    workspace=POINTER,
)
GroupedWeightsBackward = _arguments(
    "GroupedWeightsBackward",
    logits=Operand,
    weights=Operand,
    losses=Operand,
    grad_logits=Operand,
    grad=POINTER,
    factor=POINTER,
    temperature=DOUBLE,
    detach=ctypes.c_bool,
)
_FOUR = ("mean", "spread", "prior_mean", "prior_spread")
_KL_OPTIONS = {"options": Spread, "dim_floor": DOUBLE, "row_floor": DOUBLE, "reduction": Reduction}
GaussianKl = _arguments("GaussianKl", **dict.fromkeys((*_FOUR, "weights", "value", "rows"), Operand), **_KL_OPTIONS)
GaussianKlBackward = _arguments(
    "GaussianKlBackward",
    **dict.fromkeys(("grad", *_FOUR, "weights", "rows", *(f"grad_{name}" for name in _FOUR)), Operand),
    **_KL_OPTIONS,
)
SampleGaussian = _arguments(
    "SampleGaussian",
    mean=Operand,
    spread=Operand,
    rng_state=POINTER,
    z=POINTER,
    kl=Operand,
    samples=LONG,
    inner=LONG,
    options=Spread,
)
SampleGaussianBackward = _arguments(
    "SampleGaussianBackward",
    grad_z=Operand,
    grad_z_sample_stride=LONG,
    grad_kl=Operand,
    mean=Operand,
    spread=Operand,
    rng_state=POINTER,
    grad_mean=Operand,
    grad_spread=Operand,
    samples=LONG,
    inner=LONG,
    options=Spread,
)
BernoulliLogProb = _arguments("BernoulliLogProb", logits=Operand, x=Operand, value=Operand)
BernoulliLogProbBackward = _arguments(
    "BernoulliLogProbBackward", grad=Operand, logits=Operand, x=Operand, grad_logits=Operand, grad_x=Operand
)


_KL = {"classes": LONG, "unimix": Unimix, "site_floor": DOUBLE, "row_floor": DOUBLE}
CategoricalKl = _arguments(
    "CategoricalKl",
    logits_q=Vectors,
    logits_p=Vectors,
    weights=Operand,
    value=Operand,
    rows=Operand,
    **_KL,
    reduction=Reduction,
    copy=POINTER,
    loss=POINTER,
    loss_scale=DOUBLE,
)
CategoricalKlBackward = _arguments(
    "CategoricalKlBackward",
    grad=Operand,
    grad_own_q=Operand,
    grad_own_p=Operand,
    logits_q=Vectors,
    logits_p=Vectors,
    weights=Operand,
    rows=Operand,
    grad_q=Vectors,
    grad_p=Vectors,
    **_KL,
    factor_q=DOUBLE,
    factor_p=DOUBLE,
    reduction=Reduction,
)
_LABELS = {"classes": LONG, "ignore_index": LONG}
CategoricalLogProb = _arguments("CategoricalLogProb", logits=Vectors, x=Operand, value=Operand, **_LABELS)
CategoricalLogProbBackward = _arguments(
    "CategoricalLogProbBackward", grad=Operand, logits=Vectors, x=Operand, grad_logits=Vectors, **_LABELS
)
LogisticMixture = _arguments(
    "LogisticMixture", params=Vectors, x=Vectors, value=Operand, mixtures=LONG, channels=ctypes.c_int
)
LogisticMixtureBackward = _arguments(
    "LogisticMixtureBackward",
    grad=Operand,
    params=Vectors,
    x=Vectors,
    grad_params=Vectors,
    grad_x=Vectors,
    mixtures=LONG,
    channels=ctypes.c_int,
)


class Matrix(ctypes.Structure):
    _fields_ = [("data", POINTER), ("row", LONG), ("col", LONG)]


class PairWeights(ctypes.Structure):
    _fields_ = [("most", DOUBLE), ("diagonal", DOUBLE), ("following", DOUBLE), ("columns", ctypes.c_bool)]


_POSTERIORS = [
    ("dtype", INT),
    ("rows", LONG),
    ("cols", LONG),
    *((name, Matrix) for name in ("z", "mean", "logvar")),
    ("weights", PairWeights),
]


class TotalCorrelation(ctypes.Structure):
    _fields_ = [*_POSTERIORS, ("values", POINTER * 6), ("statistics", POINTER)]


class TotalCorrelationBackward(ctypes.Structure):
    _fields_ = [
        *_POSTERIORS,
        ("grads", POINTER * 6),
        ("grad_stride", LONG * 6),
        ("statistics", POINTER),
        *((f"grad_{name}", Matrix) for name in ("z", "mean", "logvar")),
    ]


class ParetoShape(ctypes.Structure):
    _fields_ = [("dtype", INT), ("rows", LONG), ("count", LONG), ("values", POINTER), ("shapes", POINTER)]


class Mmd(ctypes.Structure):
    _fields_ = [
        ("dtype", INT),
        ("x_rows", LONG),
        ("y_rows", LONG),
        ("cols", LONG),
        ("x", Matrix),
        ("y", Matrix),
        ("kernel", INT),
        ("scales", INT),
        ("parameters", DOUBLE * 16),
        ("unbiased", ctypes.c_bool),
        ("value", POINTER),
        ("grad_x", Matrix),
        ("grad_y", Matrix),
    ]


class MmdBackward(ctypes.Structure):
    _fields_ = [
        ("dtype", INT),
        ("rows", LONG * 2),
        ("cols", LONG),
        ("grad", POINTER),
        ("gradients", POINTER * 2),
        ("targets", Matrix * 2),
    ]


FORMULA_INPUTS = 5


class FormulaOptions(ctypes.Structure):
    _fields_ = [
        ("formula", INT),
        ("spread", Spread),
        ("bins", DOUBLE * 3),
        ("eps", DOUBLE),
        ("data_slope", ctypes.c_bool),
    ]


_INS = [f"in{k}" for k in range(FORMULA_INPUTS)]
_GRADS = [f"grad_in{k}" for k in range(FORMULA_INPUTS)]
_FORMULA_END = {"options": FormulaOptions, "reduction": Reduction}
RowFormula = _arguments("RowFormula", **dict.fromkeys((*_INS, "weights", "value"), Operand), **_FORMULA_END)
RowFormulaBackward = _arguments(
    "RowFormulaBackward", **dict.fromkeys(("grad", *_INS, "weights", *_GRADS), Operand), **_FORMULA_END
)
OUTPUTS = 3


class LikelihoodOptions(ctypes.Structure):
    _fields_ = [("likelihood", INT), ("bins", DOUBLE * 3)]


_GAUSSIANS = ("mean", "logvar", "prior_mean", "prior_logvar")
_OBJECTIVE = {
    "likelihood": LikelihoodOptions,
    **dict.fromkeys(("x", *(f"{kind}{k}" for kind in ("decoder", "grad_decoder") for k in range(OUTPUTS))), Operand),
    "shared": ctypes.c_bool * OUTPUTS,
    "latent": Grid,
    "latent_dtype": INT,
    **dict.fromkeys((*_GAUSSIANS, *(f"grad_{name}" for name in _GAUSSIANS)), Operand),
    "reduction": Reduction,
}
_ELBO = {**_OBJECTIVE, "weights": Operand, "kl_weight": DOUBLE}
ElboLoss = _arguments(
    "ElboLoss", **_ELBO, **dict.fromkeys(("log_likelihood", "kl", "value"), Operand), gradients=ctypes.c_bool
)
ElboLossBackward = _arguments(
    "ElboLossBackward", **_ELBO, **dict.fromkeys(("grad_log_likelihood", "grad_kl", "grad_value"), Operand)
)
_BOUND = {
    **_OBJECTIVE,
    **dict.fromkeys(("z", "grad_z"), Operand),
    "samples": LONG,
    "groups": LONG,
    "power": DOUBLE,
    "elbo_weight": DOUBLE,
    "log_w": Operand,
    "residual": Operand,
}
SampledBound = _arguments(
    "SampledBound",
    **_BOUND,
    **dict.fromkeys(("bound", "ess", "value"), Operand),
    gradients=ctypes.c_bool,
)
SampledBoundBackward = _arguments(
    "SampledBoundBackward", **_BOUND, **dict.fromkeys(("grad_log_w", "grad_value"), Operand)
)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(
    arguments: Any, columns: Sequence[int], elements: dict[str, Tensor | None], rows: dict[str, Tensor | None]
) -> None:
    """Fills in the grid and the operands: `columns` are dimensions of the elements, the others the rows'."""
    elements = {name: x for name, x in elements.items() if x is not None}
    rows = {name: x for name, x in rows.items() if x is not None}
    first = next(iter(elements.values()))
    arguments.dtype = DTYPES.index(first.dtype)
    row_dims = [d for d in range(first.dim()) if d not in columns]
    for side, dims in (("row", row_dims), ("col", list(columns))):
        strides = {name: [x.stride(d) for d in dims] for name, x in elements.items()}
        if side == "row":
            strides |= {name: list(x.stride()) if x.dim() else [0] * len(dims) for name, x in rows.items()}
        sizes = [first.size(d) for d in dims]
        total = 1
        for size in sizes:
            total *= size
        kept: list[int] = []
        merged: list[int] = []
        for i in range(len(sizes)):
            if sizes[i] == 1:
                continue
            if kept and all(s[kept[-1]] == s[i] * sizes[i] for s in strides.values()):
                merged[-1] *= sizes[i]
                kept[-1] = i
            else:
                kept.append(i)
                merged.append(sizes[i])
        assert len(kept) <= MAX_DIMS
        setattr(arguments.grid, f"{side}s", total)
        setattr(arguments.grid, f"{side}_dims", len(kept))
        getattr(arguments.grid, f"{side}_size")[:] = merged + [1] * (MAX_DIMS - len(kept))
        for name, stride in strides.items():
            getattr(getattr(arguments, name), side)[:] = [stride[i] for i in kept] + [0] * (MAX_DIMS - len(kept))
    for name, x in (elements | rows).items():
        getattr(arguments, name).data = x.data_ptr()


def describe_sites(
    arguments: Any, columns: Sequence[int], dim: int, vectors: dict[str, Tensor | None], rows: dict[str, Tensor | None],
    elements: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """The same for sites: the vectors have a further dimension `dim`, which `columns` does not count."""

    class Flat:
        """The operands themselves, where `describe` looks for them."""

    flat: Any = Flat()
    flat.grid = arguments.grid
    given = {name: x for name, x in vectors.items() if x is not None}
    for name in given:
        setattr(flat, name, getattr(arguments, name).at)
        getattr(arguments, name).step = given[name].stride(dim)
    for name in (*rows, *(elements or {})):
        setattr(flat, name, getattr(arguments, name))
    first = {name: x.select(dim, 0) for name, x in given.items()}
    describe(flat, columns, first | (elements or {}), rows)
    arguments.dtype = flat.dtype


def call(library: ctypes.CDLL, name: str, arguments: Any, multiprocessors: int) -> None:
    assert getattr(library, f"sizeof_{name}")() == ctypes.sizeof(arguments)
    function: Callable[..., Any] = getattr(library, name)
    function.restype = ctypes.c_char_p
    error = function(ctypes.byref(arguments), multiprocessors)
    assert error is None, error


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _sliced(x: Tensor) -> Tensor:
    """Misaligned, with a gap after each row."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def _chunk(x: Tensor) -> Tensor:
    """Aligned rows, with a gap after each: half of a larger tensor."""
    return torch.cat([x, torch.full_like(x, float("nan"))], dim=-1)[..., : x.shape[-1]]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = (_contiguous, _sliced, _chunk, _transposed)
# rows of less than a pack, of odd length, of a warp, of a block, of several blocks; columns alone
SHAPES = [(5, 3), (64, 8), (16, 33), (9, 256), (3, 2600), (300, 1), (1, 1000)]
LONG_SHAPE = (2, 20000)
LARGE = 10_000  # elements beyond which options that have nothing to do with size are left out


def empty_like(x: Tensor) -> Tensor:
    return torch.full_like(x, 77)


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def cases(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Any]:
    """Each dtype with each shape; layouts and numbers of multiprocessors in turn."""
    listed = []
    for shape in shapes:
        for dtype in DTYPES:
            turn = len(listed)
            # float64 has no packs, so one layout will do
            others = [] if dtype == torch.float64 else [LAYOUTS[(turn + 1 + turn // 4) % 4]]
            for layout in dict.fromkeys([LAYOUTS[turn % 4], *others]):
                multiprocessors = MULTIPROCESSORS[(len(listed) + turn // 3) % 2]
                listed.append(pytest.param(shape, dtype, layout, multiprocessors))
    for layout, dtype in ((_contiguous, torch.float32), (_chunk, torch.bfloat16), (_transposed, torch.float32)):
        listed.append(pytest.param(LONG_SHAPE, dtype, layout, 100))
    listed.append(pytest.param((64, 1000), torch.float32, _transposed, 100))  # rows split, packs along the rows
    return listed


everything = pytest.mark.parametrize("shape,dtype,layout,multiprocessors", cases())


def exclude(inputs: Sequence[Tensor | None], weights: Tensor) -> None:
    """NaN in the last row, whose weight is 0."""
    for x in inputs:
        if x is not None and 0 not in x.stride():
            x[-1] = NAN
    weights[-1] = 0


def leave_out(inputs: Sequence[Tensor | None], grads: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """NaN in the first row, whose incoming gradient is 0: nothing is wanted of it."""
    for x in inputs:
        if x is not None and 0 not in x.stride():
            x[0] = NAN
    for t in (*grads, *wanted):
        t[0] = 0


# ---- importance ------------------------------------------------------------------------------------------------------

KINDS = ("log_mean_exp", "iwae_loss", "surrogate", "effective_sample_size", "iwgan")


def _row_value(kind: str, log_w: Tensor, temperature: float, detach: bool, reduction: str) -> Tensor:
    if kind == "log_mean_exp":
        return importance.log_mean_exp(log_w, 1)[0]
    if kind == "effective_sample_size":
        return importance.effective_sample_size(log_w, 1)
    if kind == "iwgan":
        return importance.importance_weighted_generator_loss(log_w, 1, temperature, detach, reduction)[0]
    return importance.iwae_loss(log_w, 1, reduction, "surrogate" if kind == "surrogate" else "bound")[0]


@everything
def test_weight_rows(emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int) -> None:
    log_w = layout(normal(shape, dtype) * 4)
    for number, kind in enumerate(KINDS):
        temperature = 1.5 if kind == "iwgan" else 1.0
        for reduction, detach in (("none", True), ("mean", False)):
            if reduction == "mean" and kind in ("log_mean_exp", "effective_sample_size"):
                continue
            a = WeightRows(kind=number, temperature=temperature)
            value = torch.full((shape[0],) if reduction == "none" else (), 77, dtype=arithmetic(dtype))
            statistics = torch.full((3, shape[0]), 77, dtype=arithmetic(dtype))
            a.reduction = Reduction(reduction == "mean", 1.0, shape[0] if reduction == "mean" else 1.0)
            describe(a, [1], {"log_w": log_w}, {"value": value, "statistics": statistics[0]})
            if kind == "effective_sample_size":
                a.statistics = Operand()
            call(emulated, "weight_rows", a, multiprocessors)
            leaf = log_w.detach().double().requires_grad_()
            expected = _row_value(kind, leaf, temperature, detach, reduction)
            close(value, expected, arithmetic(dtype))
            if kind == "effective_sample_size":
                continue
            grad = normal(expected.shape, arithmetic(dtype), 1)
            b = WeightRowsBackward(kind=number, temperature=temperature, detach=detach, reduction=a.reduction)
            result = empty_like(log_w)
            describe(b, [1], {"log_w": log_w, "grad_log_w": result}, {"grad": grad, "statistics": statistics[0]})
            call(emulated, "weight_rows_backward", b, multiprocessors)
            wanted = torch.autograd.grad(expected, leaf, grad.double())[0]
            close(result, wanted, dtype)
            if reduction == "none":
                before = log_w[0].clone()
                leave_out([log_w], [grad], [wanted])
                statistics[:, 0] = NAN
                call(emulated, "weight_rows_backward", b, multiprocessors)
                close(result, wanted, dtype)
                log_w[0] = before


@everything
def test_weights(emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int) -> None:
    log_w = layout(normal(shape, dtype) * 4)
    a = Weights(temperature=0.7)
    weights = torch.full(shape, 77, dtype=arithmetic(dtype))
    describe(a, [1], {"log_w": log_w, "weights": weights}, {})
    call(emulated, "weights", a, multiprocessors)
    leaf = log_w.detach().double().requires_grad_()
    expected = importance.importance_weights(leaf, 1, 0.7)
    close(weights, expected, arithmetic(dtype))
    for grad in (layout(normal(shape, arithmetic(dtype), 1)), torch.ones((), dtype=arithmetic(dtype)).expand(shape)):
        b = WeightsBackward(temperature=0.7)
        result = empty_like(log_w)
        describe(b, [1], {"grad_log_w": result, "grad": grad, "weights": weights}, {})
        call(emulated, "weights_backward", b, multiprocessors)
        wanted = torch.autograd.grad(expected, leaf, grad.double(), retain_graph=True)[0]
        close(result, wanted, dtype)
        if grad.dim() and 0 not in grad.stride():
            before = weights[0].clone()
            leave_out([weights], [grad], [wanted])
            call(emulated, "weights_backward", b, multiprocessors)
            close(result, wanted, dtype)
            weights[0] = before


@pytest.mark.parametrize("columns", [4, 33, 20000])
@pytest.mark.parametrize("layout", [_contiguous, _transposed])
def test_rows_that_are_not_finite(emulated: ctypes.CDLL, columns: int, layout: Any) -> None:
    inf, nan = float("inf"), float("nan")
    log_w = normal((6, columns), torch.float32)
    log_w[1] = -inf
    log_w[2, 1] = nan
    log_w[3, 1] = inf
    log_w[4, : columns // 2] = -inf
    log_w[5, 1] = -inf
    log_w = layout(log_w)
    expected = importance.log_mean_exp(log_w, 1)[0]
    expected[3] = nan
    value, statistics = torch.empty(6), torch.empty(2, 6)
    a = WeightRows(kind=0, temperature=1.0, reduction=Reduction(False, 1.0, 1.0))
    describe(a, [1], {"log_w": log_w}, {"value": value, "statistics": statistics[0]})
    call(emulated, "weight_rows", a, 100)
    close(value, expected, torch.float32)
    result = empty_like(log_w)
    b = WeightRowsBackward(kind=0, temperature=1.0, detach=True, reduction=a.reduction)
    ones = torch.ones(6)
    describe(b, [1], {"log_w": log_w, "grad_log_w": result}, {"grad": ones, "statistics": statistics[0]})
    call(emulated, "weight_rows_backward", b, 100)
    weights = empty_like(log_w)
    c = Weights(temperature=1.0)
    describe(c, [1], {"log_w": log_w, "weights": weights}, {})
    call(emulated, "weights", c, 100)
    for got in (result, weights):
        assert (got[1] == 0).all() and got[2].isnan().all() and got[3].isnan().all()
        close(got[[0, 4, 5]], log_w[[0, 4, 5]].softmax(1), torch.float32)


PARTITION = (0.0, 0.1, 0.4, 1.0)
# kind, options, how many inputs, how many planes of statistics, and the reference: its results, then the statistics
ESTIMATORS: list[tuple[int, dict[str, Any], int, int, Callable[..., Any]]] = [
    (0, {"power": 0.7}, 1, 2, lambda x, r: importance.power_bound_loss(x, 1, 0.7, 0.0, 1.0, r)),
    (0, {"power": 0.2, "elbo_weight": 0.3}, 1, 2, lambda x, r: importance.power_bound_loss(x, 1, 0.2, 0.3, 1.0, r)),
    (0, {"power": -2.0}, 1, 2, lambda x, r: importance.power_bound_loss(x, 1, -2.0, 0.0, 1.0, r)),
    (0, {"power": 0.0}, 1, 2, lambda x, r: importance.power_bound_loss(x, 1, 0.0, 0.0, 1.0, r)),
    (0, {"power": float("inf")}, 1, 2, lambda x, r: importance.power_bound_loss(x, 1, float("inf"), 0.0, 1.0, r)),
    (1, {"points": len(PARTITION)}, 1, 7, lambda x, r: importance.tvo_loss(x, 1, PARTITION, r)),
    (2, {}, 2, 5, lambda x, y, r: importance.vimco_loss(x, y, 1, r)),
    (3, {}, 2, 2, lambda x, y, r: importance.rws_losses(x, y, 1, r)),
    (4, {}, 1, 2, lambda x, r: importance.log_variance_loss(x, 1, r)),
    (5, {"temperature": 1.5}, 2, 2, lambda x, y, r: importance.importance_weighted_sum(x, y, 1, 1.5)),
    (6, {}, 1, 4, lambda x, r: (importance.weight_diagnostics(x, 1),)),
]


def run_estimator(library: ctypes.CDLL, which: Any, inputs: list[Tensor], reduction: str, multiprocessors: int) -> None:
    """A row that is not finite may save other numbers than the reference's."""
    kind, options, _, planes, reference = which
    dtype, rows = inputs[0].dtype, inputs[0].size(0)
    wide = arithmetic(dtype)
    options = {"power": 1.0, "temperature": 1.0, **options, "partition": (DOUBLE * len(PARTITION))(*PARTITION)}
    options["reduction"] = Reduction(reduction == "mean", 1.0, rows if reduction == "mean" else 1.0)
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    *expected, statistics = reference(*leaves, reduction)
    a = Estimators(kind=kind, **options)
    saved = torch.full((planes, rows), 77, dtype=wide)
    values = [torch.full(e.shape, 77, dtype=wide) for e in expected]
    elements = {f"in{i}": x for i, x in enumerate(inputs)}
    describe(a, [1], elements, {f"value{i}": v for i, v in enumerate(values)} | {"statistics": saved[0]})
    call(library, "estimators", a, multiprocessors)
    finite = [row for row in range(rows) if all(x[row].isfinite().all() for x in inputs)]
    close(saved[:, finite], statistics[:, finite], wide)
    for got, e in zip(values, expected, strict=True):
        close(got, e, wide)
    if kind == 6:
        return
    for needed in range(1, 1 << len(inputs)):
        grads = [normal(e.shape, wide, i) for i, e in enumerate(expected)]
        results = {f"out{i}": empty_like(x) for i, x in enumerate(inputs) if needed >> i & 1}
        b = EstimatorsBackward(kind=kind, **options)
        of_rows = {f"grad{i}": g for i, g in enumerate(grads)} | {"statistics": saved[0]}
        describe(b, [1], elements | results, of_rows | ({"value": values[0]} if kind == 5 else {}))
        call(library, "estimators_backward", b, multiprocessors)
        exact = torch.autograd.grad(expected, leaves, [g.double() for g in grads], retain_graph=True)
        for name, got in results.items():
            close(got, exact[int(name[3:])], dtype)
    if reduction == "none":
        written = [(x, x.clone()) for x in inputs if 0 not in x.stride()]
        leave_out(inputs, grads, exact)
        saved[:, 0] = NAN
        call(library, "estimators_backward", b, multiprocessors)
        for name, got in results.items():
            close(got, exact[int(name[3:])], dtype)
        for x, before in written:
            x.copy_(before)


@everything
def test_estimators(emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int) -> None:
    inputs = [layout(normal(shape, dtype) * 3), layout(normal(shape, dtype, 7) * 2 - 1)]
    for which in ESTIMATORS:
        if shape[1] == 1 and which[0] in (2, 4):
            continue  # a sample is compared with others
        reduction = "none" if which[0] in (5, 6) or shape[0] * shape[1] > LARGE else "mean"
        run_estimator(emulated, which, inputs[: which[2]], reduction, multiprocessors)


@pytest.mark.parametrize("layout", [_contiguous, _transposed])
@pytest.mark.parametrize("which", ESTIMATORS, ids=lambda which: f"{which[0]}{which[1] or ''}")
def test_estimators_of_rows_that_are_not_finite(emulated: ctypes.CDLL, which: Any, layout: Any) -> None:
    inf, nan = float("inf"), float("nan")
    log_w = normal((7, 40), torch.float64)
    log_w[1] = -inf
    log_w[2, 1] = nan
    log_w[3, 5] = -inf
    log_w[4, 3] += 1000
    log_w[5, 7] = log_w[5, 9] = log_w[5].max() + 1
    if which[0] == 4:
        log_w = log_w.nan_to_num(neginf=nan)
    inputs = [layout(log_w), layout(normal((7, 40), torch.float64, 7))]
    run_estimator(emulated, which, inputs[: which[2]], "none", 100)


# ---- adversarial -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count,size", [(1, 20), (2, 64), (7, 3001), (3, 0), (30, 40), (26, 2000)])
def test_logit_loss(emulated: ctypes.CDLL, count: int, size: int, dtype: torch.dtype, multiprocessors: int) -> None:
    logits = [LAYOUTS[i % 4](normal((max(size, 1), 1 + i % 5), dtype, i)[:size]) for i in range(count)]
    terms = [i % len(adversarial.TERMS) for i in range(count)]
    reduction = "sum" if size == 0 else "mean"
    items, back_items = (LogitItem * count)(), (LogitItem * count)()
    grads = [empty_like(x) for x in logits]
    for i, x in enumerate(logits):
        for item in (items[i], back_items[i]):
            item.term, item.count = terms[i], x.numel() if reduction == "mean" else 1.0
        describe(items[i], range(x.dim()), {"logits": x}, {})
        describe(back_items[i], range(x.dim()), {"logits": x, "grad_logits": grads[i]}, {})
    leaves = [x.detach().double().requires_grad_() for x in logits]
    alone = [adversarial.logit_loss([x], 1, t, t, reduction, 0.5, True) for x, t in zip(leaves, terms, strict=True)]
    loss, expected = sum(x for x, _ in alone), torch.cat([rows for _, rows in alone])
    code = items[0].dtype
    for with_statistics in (True, False):
        value = torch.full((), 77, dtype=arithmetic(dtype))
        statistics = torch.full((count, 4), 77, dtype=arithmetic(dtype))
        pointer = statistics.data_ptr() if with_statistics else None
        call(emulated, "logit_loss", LogitLoss(items, count, code, 0.5, value.data_ptr(), pointer), multiprocessors)
        close(value, loss, arithmetic(dtype))
        if with_statistics:
            close(statistics, expected, arithmetic(dtype))
    grad = torch.full((), 3.0, dtype=arithmetic(dtype))
    call(
        emulated,
        "logit_loss_backward",
        LogitLossBackward(back_items, count, code, 0.5, grad.data_ptr()),
        multiprocessors,
    )
    for got, want in zip(grads, torch.autograd.grad(loss, leaves, grad.double()), strict=True):
        close(got, want, dtype)


@everything
def test_logit_term(emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int) -> None:
    logits = layout(normal(shape, dtype) * 2)
    few = {LONG_SHAPE: 1, SHAPES[1]: len(adversarial.TERMS)}  # all of them once
    for term in range(few.get(shape, 6)):
        out = torch.full(shape, 77, dtype=arithmetic(dtype))
        a = LogitTerm(term=term, scale=-2.0)
        describe(a, [0, 1], {"logits": logits, "out": out}, {})
        call(emulated, "logit_term", a, multiprocessors)
        leaf = logits.detach().double().requires_grad_()
        expected = adversarial.logit_term(leaf, term, -2.0)
        close(out, expected, arithmetic(dtype))
        grad = normal(shape, arithmetic(dtype), 1) if term else torch.ones((), dtype=arithmetic(dtype)).expand(shape)
        result = empty_like(logits)
        b = LogitTermBackward(term=term, scale=-2.0)
        describe(b, [0, 1], {"logits": logits, "grad": grad, "grad_logits": result}, {})
        b.dtype = a.dtype
        call(emulated, "logit_term_backward", b, multiprocessors)
        wanted = torch.autograd.grad(expected, leaf, grad.double())[0]
        close(result, wanted, dtype)
        if term == 1:
            before = logits[0].clone()
            leave_out([logits], [grad], [wanted])
            call(emulated, "logit_term_backward", b, multiprocessors)
            close(result, wanted, dtype)
            logits[0] = before


COUPLED = [
    # coupling, real term, fake term
    ("averages", "logistic_real", "logistic_fake"),
    ("averages", "least_squares_minus", "least_squares_real"),
    ("averages", "hinge_real", "hinge_fake"),
    ("ratios", "hinge_real", "hinge_fake"),
    ("ratios", "linear", "linear"),
]


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs,size", [(1, 20), (3, 3001), (13, 40)])
def test_coupled_logit_loss(
    emulated: ctypes.CDLL, pairs: int, size: int, dtype: torch.dtype, multiprocessors: int
) -> None:
    count = 2 * pairs
    logits = [LAYOUTS[i % 4](normal((size + i, 1 + i % 5), dtype, i)) for i in range(count)]
    for number, (coupling, *names) in enumerate(COUPLED):
        real_term, fake_term = (adversarial.TERM_NUMBER[name] for name in names)
        reals = 0 if fake_term == real_term else pairs
        reduction, return_stats = ("mean", "sum")[number % 2], number % 2 == 0
        items, back_items = (LogitItem * count)(), (LogitItem * count)()
        grads = [empty_like(x) for x in logits]
        for i, x in enumerate(logits):
            for item in (items[i], back_items[i]):
                item.term = real_term if i < reals else fake_term
                item.count = x.numel() if reduction == "mean" else 1.0
            describe(items[i], range(x.dim()), {"logits": x}, {})
            describe(back_items[i], range(x.dim()), {"logits": x, "grad_logits": grads[i]}, {})
        leaves = [x.detach().double().requires_grad_() for x in logits]
        loss, expected = adversarial.coupled_logit_loss(
            leaves, reals, coupling, real_term, fake_term, reduction, 0.5, return_stats
        )
        value = torch.full((), 77, dtype=arithmetic(dtype))
        statistics = torch.full((count, 6), 77, dtype=arithmetic(dtype))
        code, which = items[0].dtype, ("averages", "ratios").index(coupling) + 1
        pointers = (value.data_ptr(), statistics.data_ptr())
        a = CoupledLogitLoss(items, count, code, 0.5, *pointers, reals, which, return_stats)
        call(emulated, "coupled_logit_loss", a, multiprocessors)
        close(value, loss, arithmetic(dtype))
        shown = [0, 1, 2, 3, 4, 5] if return_stats else [0, 4, 5]
        close(statistics[:, shown], expected[:, shown], arithmetic(dtype))
        grad = torch.full((), 3.0, dtype=arithmetic(dtype))
        b = CoupledLogitLossBackward(back_items, count, code, 0.5, grad.data_ptr(), reals, which, statistics.data_ptr())
        call(emulated, "coupled_logit_loss_backward", b, multiprocessors)
        for got, want in zip(grads, torch.autograd.grad(loss, leaves, grad.double()), strict=True):
            close(got, want, dtype)


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 33, 300])
def test_grouped_weights(emulated: ctypes.CDLL, size: int, dtype: torch.dtype, multiprocessors: int) -> None:
    labels = torch.randint(-3, 4, (2 * size,), generator=torch.Generator().manual_seed(1))[::2]
    fake = normal((size, 2), dtype)[:, 1]
    for reduction, detach in (("mean", True), ("sum", False)):
        value = torch.full((), 77, dtype=arithmetic(dtype))
        statistics = torch.full((2 * size + 1,), 77, dtype=arithmetic(dtype))
        workspace = torch.full((80 * (size + 1),), 255, dtype=torch.uint8)
        a = GroupedWeights(
            temperature=0.7,
            mean=reduction == "mean",
            value=value.data_ptr(),
            statistics=statistics.data_ptr(),
            workspace=workspace.data_ptr(),
        )
        describe(a, [0], {"logits": fake, "labels": labels}, {})
        call(emulated, "grouped_weights", a, multiprocessors)
        leaf = fake.detach().double().requires_grad_()
        loss, expected = importance.grouped_importance_weighted_generator_loss(leaf, labels, 0.7, detach, reduction)
        close(value, loss, arithmetic(dtype))
        if size == 0:
            continue
        close(statistics, expected, arithmetic(dtype))
        grad, result = torch.full((), 3.0, dtype=arithmetic(dtype)), empty_like(fake)
        b = GroupedWeightsBackward(
            grad=grad.data_ptr(), factor=statistics[2 * size :].data_ptr(), temperature=0.7, detach=detach
        )
        planes = {"weights": statistics[:size], "losses": statistics[size : 2 * size]}
        describe(b, [0], {"logits": fake, "grad_logits": result, **planes}, {})
        call(emulated, "grouped_weights_backward", b, multiprocessors)
        close(result, torch.autograd.grad(loss, leaf, grad.double())[0], dtype)


# ---- divergence ------------------------------------------------------------------------------------------------------


KL_OPTIONS = [
    # prior mean, prior spread, weights, spread, free bits, its mode, clamp, reduction
    (False, False, False, "logvar", 0.0, "sum", (-INF, INF), "mean"),
    (False, False, True, "logstd", 0.9, "per_dim", (-1.0, 0.5), "none"),
    (True, True, True, "std", 1.0, "sum", (-INF, INF), "mean"),
    (True, False, False, "logvar", 0.2, "per_dim", (-1.0, 1.0), "none"),
    (False, True, False, "logvar", 6.0, "sum", (-INF, INF), "sum"),
]


@everything
def test_gaussian_kl(emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int) -> None:
    for number, (prior_mean, prior_spread, weighted, spread, free, mode, clamp, reduction) in enumerate(KL_OPTIONS):
        if number > 1 and shape[0] * shape[1] > LARGE:
            continue
        given = [layout(normal(shape, dtype, i)) for i in range(4)]
        if spread == "std":
            given[1], given[3] = (layout((x.double().exp() + 0.3).to(dtype)) for x in (given[1], given[3]))
        if not prior_mean:
            given[2] = None
        if not prior_spread:
            given[3] = None
        elif spread == "logvar":
            given[3] = layout(given[3][:1, :1].contiguous()).expand(shape)
        weights = normal(shape[:1], arithmetic(dtype), 9) if weighted else None
        if weights is not None:
            exclude(given, weights)
        floors = {"dim_floor": -INF, "row_floor": -INF}
        if free > 0:
            floors["dim_floor" if mode == "per_dim" else "row_floor"] = free
        options = Spread(("logvar", "logstd", "std").index(spread), *clamp)
        scaled = Reduction(reduction != "none", 0.5, shape[0] if reduction == "mean" else 1.0)
        value = torch.full((shape[0],) if reduction == "none" else (), 77, dtype=arithmetic(dtype))
        rows = torch.full(shape[:1], 77, dtype=arithmetic(dtype))
        tensors = dict(zip(_FOUR, given, strict=True))
        a = GaussianKl(options=options, reduction=scaled, **floors)
        describe(a, [1], tensors, {"weights": weights, "value": value, "rows": rows})
        call(emulated, "gaussian_kl", a, multiprocessors)
        leaves = [None if x is None else x.detach().double().requires_grad_() for x in given]
        double_weights = None if weights is None else weights.double()
        expected, _ = divergence.gaussian_kl(*leaves, double_weights, 1, spread, free, mode, *clamp, 0.5, reduction)
        close(value, expected, arithmetic(dtype))
        grad = normal(expected.shape, arithmetic(dtype), 5)
        results = {
            f"grad_{name}": None if x is None else empty_like(x.contiguous() if 0 in x.stride() else x)
            for name, x in tensors.items()
        }
        b = GaussianKlBackward(options=options, reduction=scaled, **floors)
        kept = rows if floors["row_floor"] > -INF else None
        describe(b, [1], tensors | results, {"grad": grad, "weights": weights, "rows": kept})
        call(emulated, "gaussian_kl_backward", b, multiprocessors)
        present = [x for x in leaves if x is not None]
        wanted = torch.autograd.grad(expected, present, grad.double())
        for got, want in zip((x for x in results.values() if x is not None), wanted, strict=True):
            close(got, want, dtype)
        if reduction == "none":
            leave_out(given, [grad], wanted)
            call(emulated, "gaussian_kl_backward", b, multiprocessors)
            for got, want in zip((x for x in results.values() if x is not None), wanted, strict=True):
                close(got, want, dtype)


SAMPLE_SHAPES = [(5, 3), (8, 8), (7, 64), (3, 1040), (300, 1), (4, 6, 8)]


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SAMPLE_SHAPES)
def test_sample_gaussian(emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, multiprocessors: int) -> None:
    rng_state = torch.tensor([2**62 + 12345, 2**61 + 678])
    choices = [(-1, 0), (3, 0), (40, shape[0] % 2), (2, len(shape)), (0, 0)]
    for number, (samples, sample_dim) in enumerate(choices):
        if samples > 3 and shape[-1] > 100:
            continue
        layout = LAYOUTS[number % 4]
        mean, logvar = layout(normal(shape, dtype)), layout(normal(shape, dtype, 1))
        clamp = (-1.0, 1.0) if samples == 3 else (-INF, INF)
        for with_kl in (True, False):
            z_shape = list(shape)
            if samples >= 0:
                z_shape.insert(sample_dim, samples)
            z = torch.full(z_shape, 77, dtype=dtype)
            kl = torch.full(shape[:-1], 77, dtype=arithmetic(dtype)) if with_kl else None
            inner = 1
            for size in shape[max(sample_dim, 0) :]:
                inner *= size
            common = {"samples": max(samples, 0) if samples >= 0 else 1, "inner": inner, "options": Spread(0, *clamp)}
            columns = [len(shape) - 1]
            a = SampleGaussian(rng_state=rng_state.data_ptr(), z=z.data_ptr(), **common)
            describe(a, columns, {"mean": mean, "spread": logvar}, {"kl": kl})
            call(emulated, "sample_gaussian", a, multiprocessors)
            leaves = [x.detach().double().requires_grad_() for x in (mean, logvar)]
            expected, expected_kl = divergence.sample_gaussian_with_kl(
                *leaves, rng_state, samples, sample_dim, 1, "logvar", *clamp
            )
            close(z, expected, dtype)
            grad_z, grad_kl = normal(z_shape, dtype, 2), None
            if number % 2:
                grad_z = _sliced(grad_z)
            outputs, grads = [expected], [grad_z.double()]
            if with_kl:
                close(kl, expected_kl, arithmetic(dtype))
                grad_kl = normal(shape[:-1], arithmetic(dtype), 3)
                outputs, grads = [expected, expected_kl], [grad_z.double(), grad_kl.double()]
            grad_mean, grad_logvar = empty_like(mean), empty_like(logvar)
            b = SampleGaussianBackward(rng_state=rng_state.data_ptr(), **common)
            of_one = grad_z
            if samples >= 0:
                b.grad_z_sample_stride = grad_z.stride(sample_dim)
                strides = [s for d, s in enumerate(grad_z.stride()) if d != sample_dim]
                of_one = grad_z.as_strided(shape, strides) if samples > 0 else torch.empty(shape, dtype=dtype)
            describe(
                b,
                columns,
                {"mean": mean, "spread": logvar, "grad_z": of_one, "grad_mean": grad_mean, "grad_spread": grad_logvar},
                {"grad_kl": grad_kl},
            )
            call(emulated, "sample_gaussian_backward", b, multiprocessors)
            for got, want in zip((grad_mean, grad_logvar), torch.autograd.grad(outputs, leaves, grads), strict=True):
                tolerance = TOLERANCE[dtype] * (4 if samples > 3 else 1)
                torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


# ---- likelihood ------------------------------------------------------------------------------------------------------


@everything
def test_bernoulli(emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int) -> None:
    for repeated, event_ndims in ((False, 1), (True, 1), (False, 0)):
        logits = normal(shape, dtype) * 3
        x = (normal(shape, torch.float64, 1) > 0).to(dtype)
        if repeated:  # [rows, 3, columns] logits of [rows, 1, columns] data
            logits = torch.stack([logits, -logits, 2 * logits], dim=1)
            x = layout(x).unsqueeze(1).expand(logits.shape)
        logits = layout(logits)
        columns = [logits.dim() - 1] if event_ndims else []
        rows = logits.shape[: logits.dim() - event_ndims]
        value = torch.full(rows, 77, dtype=arithmetic(dtype))
        a = BernoulliLogProb()
        describe(a, columns, {"logits": logits, "x": x}, {"value": value})
        call(emulated, "bernoulli_log_prob", a, multiprocessors)
        leaves = [t.detach().double().requires_grad_() for t in (logits, x)]
        expected = likelihood.bernoulli_log_prob(*leaves, event_ndims)
        close(value, expected, arithmetic(dtype))
        grad = normal(rows, arithmetic(dtype), 2)
        grad_logits, grad_x = empty_like(logits), empty_like(x)
        b = BernoulliLogProbBackward()
        describe(b, columns, {"logits": logits, "x": x, "grad_logits": grad_logits, "grad_x": grad_x}, {"grad": grad})
        call(emulated, "bernoulli_log_prob_backward", b, multiprocessors)
        wanted = torch.autograd.grad(expected, leaves, grad.double())
        for left_out in (False, event_ndims == 1 and not repeated):
            if left_out:
                leave_out([logits, x], [grad], wanted)
                call(emulated, "bernoulli_log_prob_backward", b, multiprocessors)
            for got, want in zip((grad_logits, grad_x), wanted, strict=True):
                close(got, want, dtype)


# ---- categorical -----------------------------------------------------------------------------------------------------

SITES = [(7, 3, 5), (300, 1, 2), (5, 40, 32), (2, 700, 4), (3, 2, 300), (1, 5000, 3)]  # rows, sites, classes
sites = pytest.mark.parametrize(
    "shape,dtype,layout,multiprocessors",
    [
        pytest.param(shape, dtype, LAYOUTS[(i + j) % 4], MULTIPROCESSORS[(i + j // 2) % 2])
        for i, shape in enumerate(SITES)
        for j, dtype in enumerate(DTYPES)
        if j < 2 or i in (0, 2)
    ],
)


@pytest.mark.parametrize("prior", [None, 0.0, 1e4])
def test_offsets_of_the_logits_cost_no_digits(emulated: ctypes.CDLL, prior: float | None) -> None:
    q = normal((5, 3, 8), torch.float32) * 2 + 1e4
    p = None if prior is None else normal((5, 3, 8), torch.float32, 1) * 2 + prior
    options = {"classes": 8, "unimix": Unimix(1, 0), "site_floor": -INF, "row_floor": -INF}
    value = torch.full((5,), 77.0)
    a = CategoricalKl(reduction=Reduction(False, 1.0, 1.0), **options)
    describe_sites(a, [1], 2, {"logits_q": q, "logits_p": p}, {"value": value})
    call(emulated, "categorical_kl", a, 1)
    wide = None if p is None else p.double()
    close(value, categorical.categorical_kl(q.double(), wide, None, 2, 1, 0.0, 1.0, "none"), torch.float32)


@sites
@pytest.mark.parametrize("unimix", [0.0, 0.1])
@pytest.mark.parametrize("prior", [False, True])
def test_categorical_kl(
    emulated: ctypes.CDLL, prior: bool, unimix: float, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int
) -> None:  # fmt: skip
    rows, _, classes = shape
    mix = Unimix(1 - unimix, unimix / classes)
    q, p = layout(normal(shape, dtype) * 2), layout(normal(shape, dtype, 1) * 2) if prior else None
    weights = normal((rows,), arithmetic(dtype), 2)
    kinds = [("none", False), ("mean", True)] if shape[1] < 1000 else [("mean", False)]
    for reduction, weighted in kinds:
        scaled = Reduction(reduction == "mean", 0.3, rows if reduction == "mean" else 1.0)
        options = {"classes": classes, "unimix": mix, "site_floor": -INF, "row_floor": -INF, "reduction": scaled}
        value = torch.full((rows,) if reduction == "none" else (), 77, dtype=arithmetic(dtype))
        row_tensors = {"weights": weights if weighted else None}
        if weighted:
            exclude([q, p], weights)
        a = CategoricalKl(**options)
        describe_sites(a, [1], 2, {"logits_q": q, "logits_p": p}, {**row_tensors, "value": value})
        call(emulated, "categorical_kl", a, multiprocessors)
        leaves = [t.detach().double().requires_grad_() for t in (q, p) if t is not None]
        given = (*leaves, None)[:2]
        weight = weights.double() if weighted else None
        expected = categorical.categorical_kl(*given, weight, 2, 1, unimix, 0.3, reduction)
        close(value, expected, arithmetic(dtype))
        grad = normal(expected.shape, arithmetic(dtype), 3)
        found = [empty_like(t) for t in (q, p) if t is not None]
        b = CategoricalKlBackward(factor_q=1.0, factor_p=1.0, **options)
        vectors = {"logits_q": q, "logits_p": p, "grad_q": found[0], "grad_p": found[1] if prior else None}
        describe_sites(b, [1], 2, vectors, {**row_tensors, "grad": grad})
        call(emulated, "categorical_kl_backward", b, multiprocessors)
        wanted = torch.autograd.grad(expected, leaves, grad.double())
        for got, want in zip(found, wanted, strict=True):
            close(got, want, dtype)
        if reduction == "none":
            before = q[0].clone()
            leave_out([q], [grad], wanted)
            call(emulated, "categorical_kl_backward", b, multiprocessors)
            for got, want in zip(found, wanted, strict=True):
                close(got, want, dtype)
            q[0] = before


@sites
def test_balanced_categorical_kl(
    emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int
) -> None:
    rows, variables, classes = shape
    q, p = layout(normal(shape, dtype)), layout(normal(shape, dtype, 1))
    wide = [t.detach().double().requires_grad_() for t in (q, p)]
    typical = float(categorical.categorical_kl(*wide, None, 2, 1, 0.0, 1.0, "mean").detach())
    for mode, nats in (("sum", typical), ("per_variable", typical / variables)):
        scaled = Reduction(True, 1.0, rows)
        floors = {"site_floor": nats if mode == "per_variable" else -INF, "row_floor": nats if mode == "sum" else -INF}
        options = {"classes": classes, "unimix": Unimix(0.99, 0.01 / classes), "reduction": scaled, **floors}
        kept = torch.full((rows,), 77, dtype=arithmetic(dtype)) if mode == "sum" else None
        results = [torch.full((), 77, dtype=arithmetic(dtype)) for _ in range(3)]
        a = CategoricalKl(**options, loss=results[0].data_ptr(), copy=results[2].data_ptr(), loss_scale=1.1)
        describe_sites(a, [1], 2, {"logits_q": q, "logits_p": p}, {"value": results[1], "rows": kept})
        call(emulated, "categorical_kl", a, multiprocessors)
        *expected, _ = categorical.balanced_categorical_kl(*wide, 1, nats, mode, 0.01, 1.0, 0.1)
        for got, want in zip(results, expected, strict=True):
            close(got, want, arithmetic(dtype))
        grads = [normal((), arithmetic(dtype), seed) for seed in (4, 5, 6)]
        found = [empty_like(q), empty_like(p)]
        b = CategoricalKlBackward(factor_q=0.1, factor_p=1.0, **options)
        own = {"grad": grads[0], "grad_own_p": grads[1], "grad_own_q": grads[2], "rows": kept}
        describe_sites(b, [1], 2, {"logits_q": q, "logits_p": p, "grad_q": found[0], "grad_p": found[1]}, own)
        call(emulated, "categorical_kl_backward", b, multiprocessors)
        for got, want in zip(found, torch.autograd.grad(expected, wide, [g.double() for g in grads]), strict=True):
            close(got, want, dtype)


@sites
def test_categorical_log_prob(
    emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int
) -> None:
    rows, variables, classes = shape
    logits = layout(normal(shape, dtype) * 3)
    x = torch.randint(0, classes, (rows, variables), generator=torch.Generator().manual_seed(0))
    if rows > 1:
        x[1, 0] = classes  # there is no such class
        x[-1] = -100
        logits[-1] = NAN
    value = torch.full((rows,), 77, dtype=arithmetic(dtype))
    a = CategoricalLogProb(classes=classes, ignore_index=-100)
    describe_sites(a, [1], 2, {"logits": logits}, {"value": value}, {"x": x})
    call(emulated, "categorical_log_prob", a, multiprocessors)
    leaf = logits.detach().double().requires_grad_()
    expected = categorical.categorical_log_prob(leaf, x, 2, 1, -100)
    close(value, expected, arithmetic(dtype))
    grad, result = normal((rows,), arithmetic(dtype), 2), empty_like(logits)
    b = CategoricalLogProbBackward(classes=classes, ignore_index=-100)
    describe_sites(b, [1], 2, {"logits": logits, "grad_logits": result}, {"grad": grad}, {"x": x})
    call(emulated, "categorical_log_prob_backward", b, multiprocessors)
    wanted = torch.autograd.grad(expected, leaf, grad.double())[0]
    close(result, wanted, dtype)
    leave_out([logits], [grad], [wanted])
    call(emulated, "categorical_log_prob_backward", b, multiprocessors)
    close(result, wanted, dtype)


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels,mixtures", [(3, 1), (3, 10), (1, 5), (1, 70)])
def test_logistic_mixture(
    emulated: ctypes.CDLL, channels: int, mixtures: int, dtype: torch.dtype, multiprocessors: int
) -> None:
    for layout, pixels in ((_contiguous, 3), (_transposed, 90)):
        params = layout(normal((4, pixels, mixtures * (10 if channels == 3 else 3)), dtype))
        generator = torch.Generator().manual_seed(1)
        x = layout((torch.randint(0, 256, (4, pixels, channels), generator=generator) / 127.5 - 1).to(dtype))
        x[0, 0], x[1, 1] = -1, 1
        value = torch.full((4,), 77, dtype=arithmetic(dtype))
        a = LogisticMixture(mixtures=mixtures, channels=channels)
        describe_sites(a, [1], 2, {"params": params, "x": x}, {"value": value})
        call(emulated, "logistic_mixture", a, multiprocessors)
        leaves = [t.detach().double().requires_grad_() for t in (params, x)]
        expected = categorical.discretized_logistic_mixture_log_prob(*leaves, 1)
        close(value, expected, arithmetic(dtype))
        grad, found = normal((4,), arithmetic(dtype), 2), [empty_like(params), empty_like(x)]
        b = LogisticMixtureBackward(mixtures=mixtures, channels=channels)
        vectors = {"params": params, "x": x, "grad_params": found[0], "grad_x": found[1]}
        describe_sites(b, [1], 2, vectors, {"grad": grad})
        call(emulated, "logistic_mixture_backward", b, multiprocessors)
        wanted = torch.autograd.grad(expected, leaves, grad.double())
        for got, want in zip(found, wanted, strict=True):
            close(got, want, dtype)
        leave_out([params], [grad], wanted)
        call(emulated, "logistic_mixture_backward", b, multiprocessors)
        for got, want in zip(found, wanted, strict=True):
            close(got, want, dtype)


# ---- pairwise --------------------------------------------------------------------------------------------------------


def matrix(x: Tensor) -> Matrix:
    return Matrix(x.data_ptr(), *x.stride())


# (points, columns): one tile and less, some more, several of each
PAIR_SHAPES = [(1, 1), (5, 3), (33, 2), (40, 35), (70, 7)]


@pytest.mark.parametrize("estimator", ["mss", "mws", "mss_columns"])
@pytest.mark.parametrize("turn,shape", enumerate(PAIR_SHAPES), ids=str)
@pytest.mark.parametrize(
    "away,dtype",
    [*((0, dtype) for dtype in DTYPES), (1e4, torch.float32), (1e10, torch.float32)],
    ids=str,
)
def test_total_correlation(
    emulated: ctypes.CDLL, turn: int, shape: Any, away: float, dtype: torch.dtype, estimator: str
) -> None:
    """Of latents near their posteriors, and far `away` from every one."""
    layout = LAYOUTS[(turn + DTYPES.index(dtype)) % len(LAYOUTS)]
    rows, cols = shape
    mean, logvar, noise = (normal(shape, dtype, seed) for seed in range(3))
    tensors = [layout(x) for x in (mean + (logvar / 2).exp() * noise + away, mean, logvar)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    *expected, statistics = pairwise.total_correlation(*wide, 500, estimator)
    most, diagonal, following = pairwise.pair_weights(rows, 500, estimator)
    weights = PairWeights(most, diagonal / most, following / most, estimator == "mss_columns")
    shared = (DTYPES.index(dtype), rows, cols, *map(matrix, tensors), weights)

    values = [torch.full((rows,), 77, dtype=arithmetic(dtype)) for _ in range(6)]
    kept = torch.full((cols + 4, rows), 77, dtype=arithmetic(dtype))
    a = TotalCorrelation(*shared, (POINTER * 6)(*(v.data_ptr() for v in values)), kept.data_ptr())
    call(emulated, "total_correlation", a, 1)
    for got, want in zip(values[: 3 if away else 6], expected, strict=False):  # nothing is left of differences far away
        close(got, want, arithmetic(dtype))
    close(kept[:-4], statistics[:-4], arithmetic(dtype))

    grads = [normal((rows,), arithmetic(dtype), seed) for seed in range(6)]
    grads[2] = grads[2][:1].expand(rows)
    found = [empty_like(x) for x in tensors]
    b = TotalCorrelationBackward(
        *shared,
        (POINTER * 6)(*(g.data_ptr() for g in grads)),
        (LONG * 6)(*(g.stride(0) for g in grads)),
        kept.data_ptr(),
        *map(matrix, found),
    )
    call(emulated, "total_correlation_backward", b, 1)
    wanted = torch.autograd.grad(expected, wide, [g.double() for g in grads])
    for got, want in zip(found, wanted, strict=True):
        close(got / want.abs().max(), want / want.abs().max(), dtype)
    if rows > 1:  # a row that has no gradient
        grads[2] = grads[2].clone()
        for g in grads:
            g[0] = 0
        b.grads = (POINTER * 6)(*(g.data_ptr() for g in grads))
        b.grad_stride = (LONG * 6)(*(g.stride(0) for g in grads))
        wanted = torch.autograd.grad(
            pairwise.total_correlation(*wide, 500, estimator)[:6], wide, [g.double() for g in grads]
        )
        tensors[0][0], kept[:, 0] = NAN, NAN
        call(emulated, "total_correlation_backward", b, 1)
        for got, want in zip(found, wanted, strict=True):
            close(got / want.abs().max(), want / want.abs().max(), dtype)


@pytest.mark.parametrize("length", [2, 7, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_pareto_shape(emulated: ctypes.CDLL, dtype: torch.dtype, length: int) -> None:
    tail = normal((19, length), dtype).sort(-1, descending=True).values
    tail[0], tail[1, 0], tail[2, 1:] = -INF, float("nan"), -INF
    tail[3, -3:] = tail[3, -3:].max()
    found = torch.full((19,), 77, dtype=dtype)
    a = ParetoShape(DTYPES.index(dtype), 19, length - 1, tail.data_ptr(), found.data_ptr())
    call(emulated, "pareto_shape", a, 1)
    close(found, importance.pareto_shape(tail.double()), dtype)


@pytest.mark.parametrize("kernel,unbiased", [("imq", True), ("rbf", False)])
@pytest.mark.parametrize("points", [(2, 3), (40, 33), (5, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mmd(emulated: ctypes.CDLL, points: Any, dtype: torch.dtype, kernel: str, unbiased: bool) -> None:
    n, m = points
    cols = 35 if n == 40 else 4
    layout = LAYOUTS[DTYPES.index(dtype)]
    x, y = layout(normal((n, cols), dtype)), layout(normal((m, cols), dtype, 1) + 1)
    scales = [0.1, 1.0, 5.0]
    widths = [2 * cols * s for s in scales]
    parameters = (DOUBLE * 16)(*(w if kernel == "imq" else 1 / w for w in widths))
    value = torch.full((), 77, dtype=arithmetic(dtype))
    made = [torch.full(t.shape, 77, dtype=arithmetic(dtype)) for t in (x, y)]
    a = Mmd(
        DTYPES.index(dtype), n, m, cols, matrix(x), matrix(y), ("imq", "rbf").index(kernel), len(scales), parameters,
        unbiased, value.data_ptr(), *map(matrix, made),
    )  # fmt: skip
    call(emulated, "mmd", a, 1)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    expected, _ = pairwise.mmd(*wide, kernel, scales, unbiased, 0)
    close(value, expected, arithmetic(dtype))
    wanted = torch.autograd.grad(expected, wide)
    for got, want in zip(made, wanted, strict=True):
        close(got / want.abs().max(), want / want.abs().max(), dtype)

    grad = torch.tensor(1.7, dtype=arithmetic(dtype))
    found = [empty_like(x), empty_like(y)]
    pointers = (POINTER * 2)(*(t.data_ptr() for t in made))
    b = MmdBackward(
        DTYPES.index(dtype), (LONG * 2)(n, m), cols, grad.data_ptr(), pointers, (Matrix * 2)(*map(matrix, found))
    )
    call(emulated, "mmd_backward", b, 1)
    for got, want in zip(found, wanted, strict=True):
        close(got / want.abs().max(), 1.7 * want / want.abs().max(), dtype)


def counts(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return (normal(shape, torch.float64, 3).abs() * 2).floor().to(dtype)


_PLAIN = Spread(0, -INF, INF)
_STD = Spread(2, -1.0, 0.5)
EPS = 0.7  # of the zero-inflated counts; the others have none
# number, kinds of its tensors (n normal, p positive, c counts), spread and bins, the reference of (tensors, weights,
# scale, reduction), and whether there are weights
FORMULAS: list[tuple[int, str, Any, tuple[float, ...], Callable[..., Tensor], bool]] = [
    (0, "nnp", _STD, (), lambda t, w, s, r: likelihood.gaussian_log_prob(*t, 1, "std", -1.0, 0.5), False),
    (1, "nnn", _PLAIN, (), lambda t, w, s, r: likelihood.laplace_log_prob(*t, 1), False),
    (
        2,
        "nnn",
        _PLAIN,
        (0.1, -1.0, 1.0),
        lambda t, w, s, r: likelihood.discretized_logistic_log_prob(*t, 1, 0.1, -1.0, 1.0),
        False,
    ),
    (3, "cpp", _PLAIN, (), lambda t, w, s, r: likelihood.negative_binomial_log_prob(*t, 1), False),
    (4, "cppn", _PLAIN, (), lambda t, w, s, r: likelihood.zero_inflated_negative_binomial_log_prob(*t, 1, EPS), False),
    (
        5,
        "nnpnp",
        _STD,
        (),
        lambda t, w, s, r: divergence.gaussian_kl_monte_carlo(*t, w, 1, "std", -1.0, 0.5, s, r),
        True,
    ),
    (
        6,
        "nnnn",
        _PLAIN,
        (),
        lambda t, w, s, r: divergence.gaussian_kl_monte_carlo(t[0], None, *t[1:], w, 1, "logvar", -INF, INF, s, r),
        True,
    ),
    (7, "nn", _PLAIN, (), lambda t, w, s, r: divergence.bernoulli_kl(*t, w, 1, s, r), True),
    (8, "n", _PLAIN, (), lambda t, w, s, r: divergence.bernoulli_kl(t[0], None, w, 1, s, r), True),
]


def _drawn(kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    if kind == "c":
        return counts(shape, dtype)
    x = normal(shape, dtype, seed)
    return (x.double().exp() + 0.3).to(dtype) if kind == "p" else x


@everything
def test_formulas(emulated: ctypes.CDLL, shape: Any, dtype: torch.dtype, layout: Any, multiprocessors: int) -> None:
    """Each formula in rows and, where it may be, weighted and reduced: then all dimensions are columns."""
    for number, kinds, spread, bins, reference, weighted in FORMULAS:
        if number % 4 and shape[0] * shape[1] > LARGE:
            continue
        given = [layout(_drawn(kind, shape, dtype, seed)) for seed, kind in enumerate(kinds)]
        if number == 3:  # one theta for each column
            given[2] = given[2][:1].expand(shape)
        leaves = [x.detach().double().requires_grad_() for x in given]
        options = FormulaOptions(number, spread, (DOUBLE * 3)(*bins), EPS if number == 4 else 0, True)
        for reduction in ("none", "mean") if weighted else ("none",):
            weights = normal(shape[:1], arithmetic(dtype), 9) if reduction == "mean" or number == 7 else None
            scale = 0.5 if weighted else 1.0
            scaled = Reduction(reduction == "mean", scale, shape[0] if reduction == "mean" else 1.0)
            columns = [1] if reduction == "none" else [0, 1]
            value = torch.full((shape[0],) if reduction == "none" else (), 77, dtype=arithmetic(dtype))
            tensors: dict[str, Tensor | None] = dict(zip(_INS, given, strict=False))
            if weights is not None and reduction == "mean":
                exclude(given, weights)
                leaves = [x.detach().double().requires_grad_() for x in given]
            tensors["weights"] = None if weights is None else weights.unsqueeze(1).expand(shape)
            a = RowFormula(options=options, reduction=scaled)
            describe(a, columns, tensors, {"value": value})
            call(emulated, "row_formula", a, multiprocessors)
            double_weights = None if weights is None else weights.double()
            expected = reference(leaves, double_weights, scale, reduction)
            close(value, expected, arithmetic(dtype))
            grad = normal(expected.shape, arithmetic(dtype), 5)
            results = {name: empty_like(x.contiguous()) for name, x in zip(_GRADS, given, strict=False)}
            b = RowFormulaBackward(options=options, reduction=scaled)
            describe(b, columns, tensors | results, {"grad": grad})
            call(emulated, "row_formula_backward", b, multiprocessors)
            wanted = torch.autograd.grad(expected, leaves, grad.double(), retain_graph=True)
            for got, want in zip(results.values(), wanted, strict=True):
                close(got, want, dtype)
            if reduction == "none" and not weighted:
                leave_out(given, [grad], wanted)
                call(emulated, "row_formula_backward", b, multiprocessors)
                for got, want in zip(results.values(), wanted, strict=True):
                    close(got, want, dtype)


_AT, _SURE = [1.5, -2.0, 0.0], [-90.0, -170.0, -300.0]  # means, and log-variances or log-scales
_TINY = [(x, mu, theta) for x in (1.0, 5.0, 300.0) for mu in (1e-44, 1e-30, 0.5) for theta in (1e-43, 1e-25, 2.0)]
# number of a formula, columns of numbers, the reference; whether float64 has the slopes
EXTREMES: list[tuple[int, list[Any], Callable[..., Tensor], bool]] = [
    (0, [_AT, _AT, _SURE], lambda t: likelihood.gaussian_log_prob(*t, 1, "logvar", -INF, INF), True),
    (1, [_AT, _AT, _SURE], lambda t: likelihood.laplace_log_prob(*t, 1), True),
    (
        2,
        [[0.5, -1.0, 0.5], [0.5] * 3, [100.0, 100.0, -100.0]],
        lambda t: likelihood.discretized_logistic_log_prob(*t, 1, *BINS),
        True,
    ),
    (3, list(zip(*_TINY, strict=True)), lambda t: likelihood.negative_binomial_log_prob(*t, 1), False),
    (
        4,
        [*zip(*_TINY, strict=True), [-1.0] * len(_TINY)],
        lambda t: likelihood.zero_inflated_negative_binomial_log_prob(*t, 1),
        False,
    ),
    (
        5,
        [_AT, _AT, _SURE, _AT, _SURE],
        lambda t: divergence.gaussian_kl_monte_carlo(*t, None, 1, "logvar", -INF, INF, 1.0, "none"),
        True,
    ),
    (7, [[0.0, 3.0, -3.0], [INF, -INF, INF]], lambda t: divergence.bernoulli_kl(*t, None, 1, 1.0, "none"), True),
]


@pytest.mark.parametrize("number,columns,reference,comparable", EXTREMES, ids=lambda x: str(x)[:1])
def test_extremes(emulated: ctypes.CDLL, number: int, columns: Any, reference: Any, comparable: bool) -> None:
    """What fp32 has no reciprocal, or no exponential, of."""
    given = [torch.tensor([column]) for column in columns]
    leaves = [t.detach().double().requires_grad_() for t in given]
    expected = reference(leaves)
    value, grad = torch.full((1,), 77.0), torch.ones(1)
    options = FormulaOptions(number, _PLAIN, (DOUBLE * 3)(*BINS), 0, True)
    a = RowFormula(options=options, reduction=Reduction(False, 1.0, 1.0))
    tensors = dict(zip(_INS, given, strict=False))
    describe(a, [1], tensors, {"value": value})
    call(emulated, "row_formula", a, 1)
    torch.testing.assert_close(value.double(), expected.float().double(), rtol=1e-5, atol=1e-6)
    results = {name: empty_like(x) for name, x in zip(_GRADS, given, strict=False)}
    b = RowFormulaBackward(options=options, reduction=Reduction(False, 1.0, 1.0))
    describe(b, [1], tensors | results, {"grad": grad})
    call(emulated, "row_formula_backward", b, 1)
    assert not any(t.isnan().any() for t in results.values())
    for got, want in zip(results.values(), torch.autograd.grad(expected.sum(), leaves), strict=True):
        if comparable:
            torch.testing.assert_close(got.double(), want.float().double(), rtol=1e-5, atol=3e-6)


# ---- objectives ------------------------------------------------------------------------------------------------------

# name, kinds of x and the decoder's outputs
LIKELIHOODS = [
    ("bernoulli", "un"),
    ("gaussian", "nn"),
    ("gaussian", "nnn"),
    ("laplace", "nnn"),
    ("discretized_logistic", "nnn"),
    ("negative_binomial", "cpp"),
    ("zero_inflated_negative_binomial", "cppn"),
]
BINS = (0.1, -1.0, 1.0)


def turn_of(which: int, dtype: torch.dtype) -> tuple[int, torch.dtype | None, int]:
    """What a test varies with the likelihood and the dtype: the number of its turn; the latent's dtype, if another
    (beside half float32, and the other way round); the decoder's last output."""
    turn = which + DTYPES.index(dtype)
    latent_dtype = (None, torch.bfloat16, torch.float32)[turn % 3] if dtype != torch.float64 else None
    return turn, latent_dtype, len(LIKELIHOODS[which][1]) - 2


class Objective:
    """Rows [rows…, columns] with all operands in a layout. x and the Gaussians are those of `examples`."""

    differentiable = 2

    def __init__(
        self, which: int, shape: Sequence[int], examples: Sequence[int], dtype: torch.dtype, layout: Any, *,
        latents: int = 5, latent_dtype: torch.dtype | None = None, latent_layout: Any = None, scale: float = -1.5,
        shared: Sequence[int] = (), priors: Sequence[str] = _GAUSSIANS[2:], reduction: str = "mean",
    ) -> None:  # fmt: skip
        self.name, kinds = LIKELIHOODS[which]
        self.which, self.shape, self.dtype, self.wide = which, tuple(shape), dtype, arithmetic(dtype)
        self.shared, self.reduction, self.scale = shared, reduction, scale
        self.rows, self.examples = self.shape[:-1], tuple(examples)
        self.narrow = latent_dtype or dtype
        x = _drawn(kinds[0].replace("u", "n"), (*self.examples, shape[-1]), dtype, 0)
        self.x = layout((x > 0).to(dtype) if kinds[0] == "u" else x)
        self.tensors: dict[str, Tensor] = {}
        for k, kind in enumerate(kinds[1:]):
            size = self.shape[-1:] if k in shared else self.shape
            drawn = _drawn(kind, size, dtype, k + 1)
            self.tensors[f"decoder{k}"] = layout(drawn * 0.3 if kind == "n" else drawn)
        for seed, name in enumerate(_GAUSSIANS):
            if seed < 2 or name in priors:
                drawn = normal((*self.examples, latents), self.narrow, 6 + seed) * 0.5
                self.tensors[name] = (latent_layout or layout)(drawn)

    def results(self, leaves: dict[str, Tensor]) -> Sequence[Tensor]:
        """What the reference returns; the first ones, `differentiable` of them, have gradients."""
        raise NotImplementedError

    def expected(self, grads: Sequence[Tensor] | None) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The results, and the gradients of the loss or, with `grads`, of what these weigh: the results in turn."""
        leaves = {name: t.detach().double().requires_grad_() for name, t in self.tensors.items()}
        results = self.results(leaves)
        made = torch.autograd.grad(
            results[: self.differentiable] if grads else results[0],
            list(leaves.values()),
            [g.double() for g in grads] if grads else None,
        )
        return list(results), dict(zip(leaves, made, strict=True))

    def _wide(self, name: str, t: Tensor) -> Tensor:
        """As an operand over all rows."""
        if name.removeprefix("grad_").removeprefix("decoder") in map(str, self.shared):
            return t.expand(self.shape)
        if t.dim() == len(self.rows) + 1:
            return t
        return t.unsqueeze(-2).expand(*self.rows, t.shape[-1])

    def describe(self, a: Any, made: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        a.likelihood = LikelihoodOptions(self.which, (DOUBLE * 3)(*BINS))
        a.shared = (ctypes.c_bool * OUTPUTS)(*(k in self.shared for k in range(OUTPUTS)))
        count = float(math.prod(self.examples)) if self.reduction == "mean" else 1.0
        a.reduction = Reduction(self.reduction != "none", self.scale, count)
        of_rows = {n: t if t.dim() == len(self.rows) else t.unsqueeze(-1).expand(self.rows) for n, t in rows.items()}
        gradients = {f"grad_{n}": t for n, t in made.items()}
        operands = {n: self._wide(n, t) for n, t in (self.tensors | gradients).items()}
        event = {n: t for n, t in operands.items() if "decoder" in n}
        describe(a, [len(self.rows)], event | {"x": self._wide("x", self.x)}, of_rows)

        class Latent:
            """The operands of the latent, where `describe` looks for them."""

        latent: Any = Latent()
        latent.grid = a.latent
        of_latent = {n: t for n, t in operands.items() if "decoder" not in n}
        for name in of_latent:
            setattr(latent, name, getattr(a, name))
        describe(latent, [len(self.rows)], of_latent, {})
        a.latent_dtype = latent.dtype

    def compare(self, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        for name, t in got.items():
            close(t, expected[name], t.dtype)

    def values(self, *sizes: Sequence[int]) -> list[Tensor]:
        return [torch.full(tuple(size), 77, dtype=self.wide) for size in sizes]


# ---- the evidence lower bound


class Elbo(Objective):
    differentiable = 3

    def __init__(
        self, which: int, shape: Sequence[int], dtype: torch.dtype, layout: Any, *, kl_weight: float = 0.7,
        weighted: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(which, shape, shape[:-1], dtype, layout, **options)
        self.kl_weight = kl_weight
        self.weights = normal((*self.rows, 2), self.wide, 15)[..., 1] if weighted else None

    def results(self, leaves: dict[str, Tensor]) -> Sequence[Tensor]:
        return objectives.elbo_loss(
            *(leaves.get(f"decoder{k}") for k in range(OUTPUTS)), self.x.double(),
            *(leaves.get(name) for name in _GAUSSIANS), None if self.weights is None else self.weights.double(),
            1, self.name, BINS, self.kl_weight, self.scale, self.reduction,
        )  # fmt: skip

    def describe(self, a: Any, made: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        super().describe(a, made, rows | ({} if self.weights is None else {"weights": self.weights}))
        a.kl_weight = self.kl_weight

    def forward(self, library: ctypes.CDLL, multiprocessors: int, made: dict[str, Tensor], gradients: bool) -> Any:
        results = self.values(self.rows if self.reduction == "none" else (), self.rows, self.rows)
        a = ElboLoss(gradients=gradients)
        self.describe(a, made, dict(zip(("value", "log_likelihood", "kl"), results, strict=True)))
        call(library, "elbo_loss", a, multiprocessors)
        return results

    def backward(self, library: ctypes.CDLL, multiprocessors: int, made: dict[str, Tensor], grads: Any) -> None:
        b = ElboLossBackward()
        self.describe(b, made, dict(zip(("grad_value", "grad_log_likelihood", "grad_kl"), grads, strict=True)))
        call(library, "elbo_loss_backward", b, multiprocessors)

    def made(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        return {name: empty_like(self.tensors[name]) for name in names or self.tensors}

    def check(self, library: ctypes.CDLL, multiprocessors: int) -> None:
        for gradients in (False, True) if self.reduction != "none" else (False,):
            made = self.made()
            got = self.forward(library, multiprocessors, made, gradients)
            results, expected = self.expected(None if self.reduction != "none" else self.grads())
            for mine, theirs in zip(got, results, strict=True):
                close(mine, theirs, self.wide)
            if gradients:
                self.compare(made, expected)
            else:
                assert all((grad == 77).all() for grad in made.values())
        names, latent = list(self.tensors), [name for name in self.tensors if name in _GAUSSIANS]
        expected = self.expected(self.grads())[1]
        for wanted in (names, names[::2], names[1::2], latent, names[: -len(latent)]):
            made = self.made(wanted)
            self.backward(library, multiprocessors, made, self.grads())
            self.compare(made, expected)

    def grads(self) -> list[Tensor]:
        of_value = self.rows if self.reduction == "none" else ()
        return [normal(size, self.wide, 20 + i) for i, size in enumerate((of_value, self.rows, self.rows))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(len(LIKELIHOODS)), ids=lambda which: f"{which}_{LIKELIHOODS[which][0]}")
def test_elbo_of_each_likelihood(emulated: ctypes.CDLL, which: int, dtype: torch.dtype) -> None:
    turn, latent_dtype, last = turn_of(which, dtype)
    for more, layout in enumerate((LAYOUTS[turn % 4], LAYOUTS[(turn + 2) % 4])):
        shared = [last] if last > 0 and (turn + more) % 2 else []
        Elbo(
            which, (66, 96) if (turn + more) % 3 else (3, 30, 21), dtype, layout, shared=shared,
            latent_dtype=latent_dtype, weighted=turn % 2 == more, reduction=("mean", "sum", "none")[(turn + more) % 3],
        ).check(emulated, 40)  # fmt: skip


ELBOS: list[dict[str, Any]] = [
    {"reduction": "none", "weighted": False, "latents": 70, "latent_layout": _transposed},
    {"reduction": "sum", "priors": ("prior_mean",), "shared": [1]},
    {"priors": ("prior_logvar",), "kl_weight": 0.0, "latents": 300},
    {"priors": (), "scale": 2.0, "shared": [0, 1], "weighted": False},
    {"reduction": "none", "shared": [1], "kl_weight": -1.0},
]


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("options", ELBOS, ids=lambda options: ",".join(options))
@pytest.mark.parametrize("shape", [(2, 3, 6, 12), (600, 4), (1200, 1), (7, 260), (2, 20000)], ids=str)
def test_elbo_options(emulated: ctypes.CDLL, shape: Any, options: Any, multiprocessors: int) -> None:
    """Few rows of many columns are split among blocks; many rows are summed by a second launch."""
    turn = ELBOS.index(options)
    dtype = torch.float64 if turn % 3 == 2 else torch.float32
    Elbo(2, shape, dtype, LAYOUTS[(turn + shape[0]) % 4], **options).check(emulated, multiprocessors)


@pytest.mark.parametrize("shape", [(5, 8), (3, 1), (1, 1), (1, 2000), (4, 0), (300, 4)], ids=str)
def test_elbo_of_few_numbers(emulated: ctypes.CDLL, shape: Any) -> None:
    for options in ({}, {"reduction": "none"}):
        Elbo(0, shape, torch.float32, _contiguous, **options).check(emulated, 100)
        Elbo(3, shape, torch.float32, _contiguous, shared=[1], latents=0, **options).check(emulated, 100)


def test_elbo_of_no_wanted_gradient(emulated: ctypes.CDLL) -> None:
    elbo = Elbo(2, (3, 8), torch.float32, _contiguous)
    elbo.backward(emulated, 100, {}, elbo.grads())


@pytest.mark.parametrize("shared", [[], [1]])
def test_elbo_of_silenced_rows(emulated: ctypes.CDLL, shared: list[int]) -> None:
    """Coefficients of 0 have gradients of 0, be the slopes infinite."""
    elbo = Elbo(2, (4, 8), torch.float32, _contiguous, shared=shared)
    assert elbo.weights is not None
    elbo.weights[0] = 0
    elbo.tensors["decoder0"][0] = -1e30  # whose square overflows
    elbo.tensors["logvar"][0] = 200
    made = elbo.made()
    assert elbo.forward(emulated, 100, made, True)[1][0] == -float("inf")
    backward = elbo.made()
    grads = [torch.ones(()), torch.zeros(4), torch.zeros(4)]
    elbo.backward(emulated, 100, backward, grads)
    for name, grad in made.items():
        torch.testing.assert_close(grad, backward[name])
        assert grad.isfinite().all()
        if name != "decoder1" or not shared:
            assert (grad[0] == 0).all() and (grad[1:] != 0).all()

    # of the log-likelihood alone: the KL's coefficient is 0
    elbo.backward(emulated, 100, backward, [torch.zeros(()), torch.ones(4), torch.zeros(4)])
    assert all((backward[name] == 0).all() for name in _GAUSSIANS)
    elbo.kl_weight = 0
    elbo.weights[0] = 1
    elbo.tensors["decoder0"][0] = 0
    elbo.forward(emulated, 100, made, True)
    assert all((made[name] == 0).all() for name in _GAUSSIANS)
    assert all((made[name].isfinite() & (made[name] != 0)).all() for name in ("decoder0", "decoder1"))


# ---- bounds of several samples


class Bound(Objective):
    """Rows are examples × samples."""

    def __init__(
        self, which: int, shape: Sequence[int], dtype: torch.dtype, layout: Any, *, groups: int = 1, power: float = 1.0,
        elbo_weight: float = 0.0, latents: int = 5, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(which, shape, shape[:-2], dtype, layout, latents=latents, **options)
        self.options = (groups, power, elbo_weight)
        self.tensors["z"] = layout(normal((*self.rows, latents), self.narrow, 5))

    def results(self, leaves: dict[str, Tensor]) -> Sequence[Tensor]:
        return objectives.multi_sample_bound(
            *(leaves.get(f"decoder{k}") for k in range(OUTPUTS)), self.x.double(),
            *(leaves.get(name) for name in ("z", *_GAUSSIANS)), len(self.examples), 1, self.name, BINS, *self.options,
            self.scale, self.reduction,
        )  # fmt: skip

    def describe(self, a: Any, made: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        super().describe(a, made, rows)
        a.samples = self.shape[-2]
        a.groups, a.power, a.elbo_weight = self.options

    def check(self, library: ctypes.CDLL, multiprocessors: int) -> None:
        made = {name: empty_like(t) for name, t in self.tensors.items()}
        (value,) = self.values(self.examples if self.reduction == "none" else ())
        bound, ess, log_w, residual = self.values(self.examples, self.examples, self.rows, self.rows)
        rows = {"log_w": log_w, "residual": residual, "bound": bound, "ess": ess}
        for gradients in (False, True) if self.reduction != "none" else (False,):
            a = SampledBound(gradients=gradients)
            self.describe(a, made if gradients else {}, rows | ({"value": value} if value.dim() else {}))
            a.value.data = value.data_ptr()
            call(library, "sampled_bound", a, multiprocessors)
            results, expected = self.expected(None) if value.dim() == 0 else self.expected(self.grads(value))
            for got, want in zip((value, log_w, bound, ess), results[:4], strict=True):
                close(got, want, self.wide)
            assert (residual.abs() <= 2**-22 * log_w.abs()).all()
            # what is rounded twice that coarsely is far less than what is summed more coarsely
            assert ((log_w.double() + residual - results[1]).abs() <= 4e-6 * (1 + results[1].abs())).all()
            if gradients:
                self.compare(made, expected)
        grads = self.grads(value)
        expected = self.expected(grads)[1]
        for wanted in (list(made), list(made)[1::2]):
            made = {name: empty_like(self.tensors[name]) for name in wanted}
            b = SampledBoundBackward()
            of_rows = {"log_w": log_w, "residual": residual, "grad_log_w": grads[1]} | (
                {"grad_value": grads[0]} if value.dim() else {}
            )
            self.describe(b, made, of_rows)
            b.grad_value.data = grads[0].data_ptr()
            call(library, "sampled_bound_backward", b, multiprocessors)
            self.compare(made, expected)

    def grads(self, value: Tensor) -> list[Tensor]:
        return [normal(value.shape, self.wide, 20), normal(self.rows, self.wide, 21)]


def make_certain(objective: Objective) -> None:
    """Means at the data and in z, of spreads that fp32 has no reciprocal of."""
    for name, t in objective.tensors.items():
        t.fill_(-90.0 if name in ("decoder1", "logvar", "prior_logvar") else 0.25)
    objective.x.fill_(0.25)


@pytest.mark.parametrize("which", [2, 3])
def test_certain_decoders_and_latents(emulated: ctypes.CDLL, which: int) -> None:
    for objective in (
        Elbo(which, (6, 12), torch.float32, _contiguous),
        Bound(which, (4, 3, 12), torch.float32, _contiguous),
    ):
        make_certain(objective)
        objective.check(emulated, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(len(LIKELIHOODS)), ids=lambda which: f"{which}_{LIKELIHOODS[which][0]}")
def test_bound_of_each_likelihood(emulated: ctypes.CDLL, which: int, dtype: torch.dtype) -> None:
    turn, latent_dtype, last = turn_of(which, dtype)
    shared = [last] if last > 0 and turn % 2 else []
    shape = (3, 22, 96) if turn % 2 == 0 else (3, 50, 21)
    bound = Bound(which, shape, dtype, LAYOUTS[turn % 2], shared=shared, latent_dtype=latent_dtype)
    bound.check(emulated, 40)


ESTIMATES = [
    {"power": 1.0, "elbo_weight": 0.3, "reduction": "sum"},
    {"power": 0.5, "groups": 2, "reduction": "none"},
    {"power": 0.1, "elbo_weight": 0.2, "priors": ()},
    {"power": 0.0, "groups": 3},
    {"power": float("inf"), "reduction": "none"},
    {"power": -float("inf"), "groups": 2, "shared": [1], "latents": 40},
    {"power": -1.0, "groups": 6, "latents": 70, "shared": [1]},
]


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("options", ESTIMATES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 6, 12), (1, 1536, 3), (2, 6, 700)], ids=str)
def test_bound_of_each_estimator(emulated: ctypes.CDLL, shape: Any, options: Any, multiprocessors: int) -> None:
    turn = ESTIMATES.index(options)
    dtype = torch.float64 if shape[1] > 1000 or turn % 2 else torch.float32
    Bound(2, shape, dtype, LAYOUTS[turn % 4], **options).check(emulated, multiprocessors)


@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_bound_of_teams(emulated: ctypes.CDLL, dtype: torch.dtype, capability: int) -> None:
    """Several blocks for an example, which meet at the end of a launch or in a cluster."""
    emulated.set_compute_capability(capability)
    Bound(2, (7, 100, 96), dtype, _contiguous, groups=4, shared=[1], latents=70).check(emulated, 100)
    emulated.set_compute_capability(9)


@pytest.mark.parametrize("shape", [(5, 1, 8), (3, 1, 1), (1, 1, 2000), (4, 3, 0), (300, 2, 4)], ids=str)
def test_bound_of_few_numbers(emulated: ctypes.CDLL, shape: Any) -> None:
    Bound(0, shape, torch.float32, _contiguous).check(emulated, 100)
    Bound(3, shape, torch.float32, _contiguous, shared=[1], latents=0).check(emulated, 100)


@pytest.mark.parametrize("which,power", [(0, 1.0), (0, 0.5), (1, 1.0)])
def test_bound_of_impossible_samples(emulated: ctypes.CDLL, which: int, power: float) -> None:
    """Weights of 0 have gradients of 0, be the slopes infinite, and do not spoil the other samples' gradients."""
    bound = Bound(which, (3, 6, 8), torch.float32, _contiguous, groups=2, power=power)
    bound.x[:, 0] = 1
    logits = bound.tensors["decoder0"]
    logits[0, 1, 0] = logits[1, :3, 0] = logits[2, :, 0] = -float("inf")
    value = torch.full((), 77.0)
    log_w, residual, ess, bounds = (torch.full(size, 77.0) for size in ((3, 6), (3, 6), (3,), (3,)))
    made = {name: empty_like(t) for name, t in bound.tensors.items()}
    a = SampledBound(gradients=True)
    bound.describe(a, made, {"log_w": log_w, "residual": residual, "bound": bounds, "ess": ess})
    a.value.data = value.data_ptr()
    call(emulated, "sampled_bound", a, 100)
    assert torch.equal(log_w == -float("inf"), logits[:, :, 0] == -float("inf"))
    assert bounds.isfinite().tolist() == [True, False, False] and ess[2] == 0 and not ess.isnan().any()
    assert all(grad.isfinite().all() for grad in made.values())
    for name in ("decoder0", "z"):
        assert (made[name][log_w == -float("inf")] == 0).all() and (made[name][0, 0] != 0).all()
    assert (made["mean"][2] == 0).all() and (made["logvar"][2] == 0).all()


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction,expected", [("mean", float("nan")), ("sum", 0.0)])
def test_no_rows(emulated: ctypes.CDLL, reduction: str, expected: float) -> None:
    value = torch.full((), 77.0)
    empty = torch.empty(0, 5)
    scaled = Reduction(True, 1.0, 0.0 if reduction == "mean" else 1.0)
    a = GaussianKl(options=Spread(0, -INF, INF), dim_floor=-INF, row_floor=-INF, reduction=scaled)
    describe(a, [1], {"mean": empty, "spread": empty}, {"value": value})
    a.mean.data = a.spread.data = value.data_ptr()
    call(emulated, "gaussian_kl", a, 100)
    torch.testing.assert_close(value, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("reduction,expected", [("mean", float("nan")), ("sum", 0.0)])
def test_elbo_of_no_rows(emulated: ctypes.CDLL, reduction: str, expected: float) -> None:
    value, made = torch.full((), 77.0), {"decoder1": torch.full((5,), 77.0)}
    elbo = Elbo(2, (0, 5), torch.float32, _contiguous, shared=[1], reduction=reduction, weighted=False)
    a, b = ElboLoss(gradients=True), ElboLossBackward()
    for arguments in (a, b):
        elbo.describe(arguments, made, {})
        arguments.grad_decoder1.data = made["decoder1"].data_ptr()
    a.value.data = value.data_ptr()
    call(emulated, "elbo_loss", a, 100)
    torch.testing.assert_close(value, torch.tensor(expected), equal_nan=True)
    assert (made["decoder1"] == 0).all()
    made["decoder1"][:] = 77
    call(emulated, "elbo_loss_backward", b, 100)
    assert (made["decoder1"] == 0).all()


@pytest.mark.parametrize("reduction,expected", [("mean", float("nan")), ("sum", 0.0)])
def test_bound_of_no_rows(emulated: ctypes.CDLL, reduction: str, expected: float) -> None:
    value, made = torch.full((), 77.0), {"decoder1": torch.full((5,), 77.0)}
    bound = Bound(2, (0, 3, 5), torch.float32, _contiguous, shared=[1], reduction=reduction)
    a = SampledBound(gradients=True)
    bound.describe(a, made, {})
    a.value.data, a.grad_decoder1.data = value.data_ptr(), made["decoder1"].data_ptr()
    call(emulated, "sampled_bound", a, 100)
    torch.testing.assert_close(value, torch.tensor(expected), equal_nan=True)
    assert (made["decoder1"] == 0).all()


def test_no_columns(emulated: ctypes.CDLL) -> None:
    value, empty = torch.full((3,), 77.0), torch.empty(3, 0)
    a = BernoulliLogProb()
    describe(a, [1], {"logits": empty, "x": empty}, {"value": value})
    call(emulated, "bernoulli_log_prob", a, 100)
    assert (value == 0).all()
