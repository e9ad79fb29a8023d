"""What `info()` says, and that the kernels can be taken away, or changed for others, without changing a number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import NATIVE

import unigen_fast as uf
from unigen_fast import _loader

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


def assert_same_numbers(got: dict, expected: dict) -> None:
    assert got["results"].keys() == expected["results"].keys()
    for name, numbers in expected["results"].items():
        tolerance = 1e-11 if "float64" in name else 1e-5 if "float32" in name else 2e-4
        assert got["results"][name] == pytest.approx(numbers, rel=tolerance, abs=1e-9), name


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


def test_autograd_node_of_another_torch_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it might crash; so it is not even imported."""
    monkeypatch.setattr(_loader, "_build_report", lambda: {"torch": "2.9.1"})
    monkeypatch.setattr(_loader.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_loader.importlib, "import_module", lambda name: pytest.fail("imported"))
    backend = _loader._autograd(set(), _loader.Backend("cpu", True, ""))
    assert not backend.loaded
    assert backend.detail == "Python's node: the one in C++ was built for torch 2.9.1"


def test_module_of_an_older_build_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loader, "_build_report", lambda: {"cpu": "the build failed"})
    monkeypatch.setattr(_loader.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_loader.importlib, "import_module", lambda name: pytest.fail("imported"))
    assert str(_loader._extension("cpu", set())) == "cpu      no  not built: the build failed"


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
