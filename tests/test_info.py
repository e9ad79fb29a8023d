"""What `info()` says, and that the kernels can be taken away, or changed for others, without changing a number."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import NATIVE

import unigen_fast as uf
from unigen_fast import _build, _loader
from unigen_fast._fused import FusedOp

needs_cpu = pytest.mark.skipif(not NATIVE["cpu"], reason="the CPU kernels are not loaded")
ROOT = Path(uf.__file__).resolve().parent.parent
# one number for the value and one for the gradients of an op of each family, at a size that vectors do not divide
PROGRAM = """
import json, torch, unigen_fast as uf
torch.manual_seed(0)
results = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    x, y, z = (torch.randn(13, 531).to(dtype).requires_grad_() for _ in range(3))
    calls = {
        "log_mean_exp": lambda: uf.log_mean_exp(x, dim=1).sum(),
        "importance_weights": lambda: (uf.importance_weights(x, dim=0, detach=False) * y).sum(),
        "diagnostics": lambda: torch.stack(uf.weight_diagnostics(x, dim=1)).double().sum() + 0 * x.sum(),
        "effective_sample_size": lambda: uf.effective_sample_size(x, dim=1).sum() + 0 * x.sum(),
        "iwae_loss": lambda: uf.iwae_loss(x, dim=0),
        "discriminator_loss": lambda: uf.discriminator_loss(real=x, fake=y),
        "hinge": lambda: uf.discriminator_loss(real=x, fake=y, kind="hinge"),
        "generator_loss": lambda: uf.generator_loss(fake=x, kind="saturating"),
        "rows": lambda: uf.generator_loss(fake=x, reduction="none").sum(),
        "iwgan": lambda: uf.importance_weighted_generator_loss(fake=x),
        "gaussian_kl": lambda: uf.gaussian_kl(x, y, z),
        "sample": lambda: uf.sample_gaussian(x, y).float().sum(),
        "sample_with_kl": lambda: sum(o.float().mean() for o in uf.sample_gaussian_with_kl(x, y)),
        "bernoulli": lambda: uf.bernoulli_log_prob(x, y.sigmoid().detach()).mean(),
        "renyi": lambda: uf.renyi_loss(x, dim=1, alpha=0.9),
        "tvo": lambda: uf.tvo_loss(x, dim=0, partition=(0.0, 0.3, 1.0)),
        "vimco": lambda: uf.vimco_loss(x, y, dim=1),
        "rws": lambda: sum(uf.rws_losses(x, y, dim=1)),
        "weighted sum": lambda: uf.importance_weighted_sum(x, y, dim=1, detach=False).mean(),
        "relativistic": lambda: uf.discriminator_loss(real=x, fake=y, kind="relativistic_average"),
        "classes": lambda: uf.importance_weighted_generator_loss(fake=x.flatten(), groups=torch.arange(13 * 531) % 7),
        "categorical": lambda: uf.categorical_kl(x, y, unimix=0.01).mean(),
        "balanced": lambda: uf.balanced_categorical_kl(x, y, event_ndims=0).loss,
        "mixture": lambda: uf.discretized_logistic_mixture_log_prob(x, y[:, :1].detach().sin(), event_ndims=1).mean(),
        "total correlation": lambda: sum(r.mean() for r in uf.total_correlation(x, y, z.sin(), dataset_size=99)),
        "mmd": lambda: uf.mmd(x, y + 1),
        "gaussian": lambda: uf.gaussian_log_prob(x, y, z.sin()).mean(),
        "logistic": lambda: uf.discretized_logistic_log_prob(x.detach().sin(), y, z.sin()).mean(),
        "counts": lambda: uf.negative_binomial_log_prob(x.detach().exp().round(), y.exp(), z.exp()).mean(),
    }
    for name, call in calls.items():
        torch.manual_seed(1)
        loss = call()
        gradients = torch.autograd.grad(loss, (x, y, z), allow_unused=True)
        sums = [float(g.double().abs().sum()) for g in gradients if g is not None]
        results[f"{name}, {dtype}"] = [float(loss), *sums]
print(json.dumps({"info": str(uf.info()), "results": results}))
"""


def run(**environment: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("UNIGEN_FAST") and k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:unigen_fast", "-c", PROGRAM],
        env={**clean, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_kernels() -> dict:
    return run(UNIGEN_FAST_DISABLE="cpu,cuda,triton,autograd")


def assert_same_numbers(got: dict, without_kernels: dict) -> None:
    """Up to rounding, but for samples: without kernels they are PyTorch's own."""
    assert got["results"].keys() == without_kernels["results"].keys()
    for name, numbers in without_kernels["results"].items():
        if name.startswith("sample"):
            continue
        relative = 1e-11 if "float64" in name else 1e-5 if "float32" in name else 2e-4
        absolute = 1e-9 if "float64" in name else 1e-6
        assert got["results"][name] == pytest.approx(numbers, rel=relative, abs=absolute), name


def test_info() -> None:
    info = uf.info()
    assert [b.name for b in info.backends] == ["cpu", "cuda", "triton", "autograd"]
    lines = str(info).splitlines()
    assert lines[0].startswith(f"unigen_fast {uf.__version__}, torch {torch.__version__}, Python 3.")
    for backend, line in zip(info.backends, lines[1:], strict=False):
        assert backend.detail and "\n" not in backend.detail, "one line each, with a reason or a description"
        assert line.split()[:2] == [backend.name, "yes" if backend.loaded else "no"]
        assert line.endswith(backend.detail)
    assert lines[5:] == (
        [] if any(NATIVE.values()) else ["no kernels: every function runs its plain PyTorch reference"]
    )


def test_kernels_can_be_left_out(without_kernels: dict) -> None:
    """The reason in one line, and the same numbers from the reference."""
    lines = without_kernels["info"].splitlines()
    names = ("cpu", "cuda", "triton", "autograd")
    assert lines[1:5] == [f"{name:<8} no  left out by UNIGEN_FAST_DISABLE" for name in names]
    assert lines[5] == "no kernels: every function runs its plain PyTorch reference"
    assert_same_numbers(run(), without_kernels)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What the loader has found is forgotten, before and after."""
    functions = (_loader._report, _loader._library, _loader._cpu, _loader._autograd, _loader._cuda, _loader._triton)
    kept = [(op, op.native) for op in FusedOp.every], set(FusedOp.devices)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()
    for op, native in kept[0]:
        op.native = native
    FusedOp.devices.clear()
    FusedOp.devices.update(kept[1])


def refused(name: str, **report: Any) -> str:
    """Why a set of kernels is not loaded, given this report of its build; it must not be opened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_loader, "_report", lambda: {"ops": _build.declarations(), "torch": torch.__version__, **report})
        patch.setattr(Path, "exists", lambda path: True)
        patch.setattr(_loader.ctypes, "CDLL", lambda path: pytest.fail("opened"))
        patch.setattr(_loader.importlib, "import_module", lambda name: pytest.fail("imported"))
        backend = _loader._load(name) if name != "autograd" else _loader._autograd()
    assert not backend.loaded
    return backend.detail


@needs_cpu
def test_autograd_node_of_another_torch_is_left_out(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it might crash; so it is not even imported."""
    monkeypatch.setattr(_loader, "_cpu", lambda: _loader.Backend("cpu", True, ""))
    detail = refused("autograd", torch="2.9.1")
    assert detail == "Python's node: the one in C++ was built for torch 2.9.1 (python -m unigen_fast build)"


@pytest.mark.parametrize(
    ("built_for", "running", "serves"),
    [
        ("2.13.0+cpu", "2.13.0+cu130", True),
        ("2.13.0", "2.13.0+cpu", True),
        ("2.13.0", "2.13.1", False),
        ("2.14.0a0+git12345", "2.14.0a0+git12345", True),
        ("2.14.0a0+git12345", "2.14.0a0+git67890", False),
        (None, "2.13.0", False),
    ],
)
def test_builds_of_one_release_share_the_node(built_for: str | None, running: str, serves: bool) -> None:
    assert _loader._serves(built_for, running) == serves


@needs_cpu
def test_kernels_of_other_declarations_are_left_out(forgetful: None) -> None:
    detail = refused("cpu", ops="of yesterday")
    assert detail == "built from another version of the package: python -m unigen_fast build"


@needs_cpu
def test_kernels_of_another_signature_are_left_out(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called with the arguments of the schema, they would crash."""
    swapped = [schema.replace("int dim, str reduction", "str reduction, int dim") for schema in FusedOp.schemas]
    assert swapped != FusedOp.schemas
    monkeypatch.setattr(FusedOp, "schemas", swapped)
    backend = _loader._load("cpu")
    assert not backend.loaded
    assert "which is not as the package declares it: python -m unigen_fast build" in backend.detail


@needs_cpu
def test_an_op_without_a_kernel_runs_its_reference(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new one does, until its kernels are written."""
    monkeypatch.setattr(FusedOp, "schemas", [*FusedOp.schemas, "brand_new(Tensor x) -> Tensor"])
    new = SimpleNamespace(name="brand_new", native=None)
    monkeypatch.setattr(FusedOp, "every", [*FusedOp.every, new])
    assert _loader._library("cpu") is not None
    # the kernels are registered already; what remains is to bind the node
    monkeypatch.setattr(_loader, "_cpu", lambda: _loader.Backend("cpu", True, ""))
    assert _loader._autograd().loaded == NATIVE["autograd"]
    assert new.native is None


def test_the_reason_of_a_failed_build(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loader, "_report", lambda: {"reasons": {"cpu": "the build failed:\nfirst\nlast"}})
    monkeypatch.setitem(_build.LIBRARIES, "cpu", "never built.so")
    lines = str(_loader._load("cpu")).splitlines()
    assert [line.strip() for line in lines] == ["cpu      no  not built: the build failed:", "first", "last"]


def test_a_gpu_too_old_for_the_cuda_kernels(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (7, 5))[device])
    monkeypatch.setattr(_loader, "_library", lambda name: None)
    monkeypatch.setattr(_loader, "_text", lambda library, function: "CUDA 13.0, sm_80 sm_90")
    assert _loader._cuda().detail == "built for sm_80 and later, and the GPU is sm_75"


def test_an_unsupported_triton_is_named(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loader, "_cuda", lambda: _loader.Backend("cuda", False, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_loader.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_loader.importlib, "import_module", lambda name: SimpleNamespace(__version__="3.1.0"))
    monkeypatch.setattr(_loader, "_interpreted", lambda: False)
    assert _loader._triton().detail == "got Triton 3.1.0, expected 3.6 or later"


def test_the_import_asks_no_driver() -> None:
    """A process that forks after it could not use a GPU. The first call with a tensor on one asks."""
    program = """
import torch
asked = []
torch.cuda.is_available = lambda: asked.append("available") or False
if hasattr(torch._C, "_cuda_getDeviceCount"):
    torch._C._cuda_getDeviceCount = lambda: asked.append("count") or 0
import unigen_fast as uf
from unigen_fast._fused import FusedOp
uf.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3))
assert not asked, asked
FusedOp.load_gpu()
assert torch.version.cuda is None or asked
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("variable", "word"), [("UNIGEN_FAST_DISABLE", "gpu"), ("UNIGEN_FAST_ISA", "sse"), ("UNIGEN_FAST_CHECK", "yes")]
)
def test_unknown_words_of_the_environment(variable: str, word: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", "import unigen_fast"],
        env={**environment, variable: word},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert f"{variable}: got {word!r}, expected " in finished.stderr


@needs_cpu
def test_the_instruction_set_as_info_spells_it() -> None:
    assert "default" in run(UNIGEN_FAST_ISA="DEFAULT")["info"].splitlines()[1]


def test_no_kernels_is_said_once(tmp_path: Path) -> None:
    """With the line that mends it; who leaves them out knows."""
    package = tmp_path / "unigen_fast"
    shutil.copytree(ROOT / "unigen_fast", package, ignore=shutil.ignore_patterns("*.so", "_build_report.json"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("UNIGEN_FAST") and k != "TRITON_INTERPRET"}
    said = []
    for environment in ({}, {"UNIGEN_FAST_DISABLE": "cpu"}):
        command = [sys.executable, "-c", "import unigen_fast; import unigen_fast.nn"]
        finished = subprocess.run(
            command,
            env={**clean, "PYTHONPATH": str(tmp_path), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        said.append(finished.stderr)
    assert said[0].count("unigen_fast has no kernels here") == 1
    assert "python -m unigen_fast build" in said[0]
    assert said[1] == ""


def test_one_backend_can_be_left_out() -> None:
    lines = run(UNIGEN_FAST_DISABLE=" triton , cpu")["info"].splitlines()
    assert "UNIGEN_FAST_DISABLE" in lines[1] and "UNIGEN_FAST_DISABLE" in lines[3]
    assert "UNIGEN_FAST_DISABLE" not in lines[2]


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_units_of_every_instruction_set_agree(isa: str, without_kernels: dict) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in {"default": (capability,), "avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}[isa]:
        pytest.skip(f"this CPU has no {isa}")
    got = run(UNIGEN_FAST_ISA=isa)
    if NATIVE["cpu"]:
        assert isa in got["info"].splitlines()[1].lower()
    assert_same_numbers(got, without_kernels)
