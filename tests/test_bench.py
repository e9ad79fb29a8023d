"""The benchmark measures what it says: right code, against peers that compute the same, with figures that add up.

Numbers and errors only; no timing is asserted.
"""

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.optimizer import register_optimizer_step_pre_hook

from unigen_fast import bench, models
from unigen_fast.bench import harness, report, steps
from unigen_fast.bench.cases import ROWS, Row, describe_shapes

CPU = torch.device("cpu")
SMALL_STEPS = {
    step.name: step
    for step in (
        steps.iwae_mnist(batch=5, samples=7, pixels=20, hidden=16, latent=3),
        steps.dreamer_kl(batch=3, time=4, observation=10, actions=2, units=16, latents=5, classes=6),
        steps.beta_tcvae(batch=9, pixels=20, hidden=16, latent=3),
        steps.vocoder_discriminator(batch=2, segment=200, discriminators=3, channels=4),
        *steps.compiled_steps(batch=5, samples=3, pixels=20, hidden=16, latent=3),
    )
}
IWAE = SMALL_STEPS["step_iwae_mnist"]


def shrunk(row: Row) -> Row:
    """At most 37 along each dimension: more than a vector, and no multiple of one."""
    inputs = tuple(dataclasses.replace(item, shape=tuple(min(n, 37) for n in item.shape)) for item in row.inputs)
    return dataclasses.replace(row, inputs=inputs)


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_MEMORY_COPY", {"cpu": 2**20, "cuda": 2**20})


@pytest.fixture
def record() -> dict[str, Any]:
    """A run with a row won and one lost, made up."""

    def figures(seconds: float, peak: int) -> dict[str, Any]:
        spread = [0.9 * seconds, 1.2 * seconds]
        return {
            "seconds": seconds,
            "quartiles": spread,
            "rounds": 9,
            "host_seconds": None,
            "device_seconds": None,
            "peak_bytes": peak,
        }

    def row(name: str, dtype: str, eager: float, compiled: float, level: str) -> dict[str, Any]:
        faster = "eager" if eager < compiled else "compile"
        return {
            "row": name,
            "family": ROWS[name].family,
            "dtype": dtype,
            "replaces": ROWS[name].replaces,
            "shapes": [list(item.shape) for item in ROWS[name].inputs],
            "floor_bytes": 1000,
            "result_bytes": 500,
            "contestants": {
                "fused": figures(2e-5, 1024),
                "eager": figures(eager, 2048),
                "compile": figures(compiled, 4096),
            },
            "missing": {},
            "fastest_peer": faster,
            "ratio": min(eager, compiled) / 2e-5,
            "ratios": [min(eager, compiled) / 2e-5],
            "copy_level": level,
            "copy_share": 0.5,
            "error": None,
        }

    return {
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"type": "cpu", "name": "Some CPU"},
        "threads": 2,
        "versions": {"unigen_fast": "0", "torch": "2.13.0", "triton": None, "python": "3.11"},
        "kernels": ["cpu     yes"],
        "seconds_per_row": 1.0,
        "passes": 3,
        "copy_bandwidth": {"memory": 1e10, "cache": 5e10},
        "rows": [
            row("logits_64", "float32", 6e-5, 5e-5, "cache"),
            row("gaussian_kl_large", "bfloat16", 1.5e-5, 3e-5, "memory"),
        ],
        "steps": [],
    }


@pytest.fixture
def record_of_steps(record) -> dict[str, Any]:
    """The same with training steps won, lost, and neither; made up."""
    contestants = json.dumps(record["rows"][0]["contestants"])

    def step(name: str, eager: float, compiled: float) -> dict[str, Any]:
        figures = json.loads(contestants)
        for contestant, seconds in {"fused": 0.1, "eager": eager, "compile": compiled}.items():
            figures[contestant] |= {"seconds": seconds, "quartiles": [0.9 * seconds, 1.2 * seconds]}
        return {
            "step": name,
            "stands_for": steps.STEPS[name].stands_for,
            "sizes": steps.STEPS[name].sizes,
            "contestants": figures,
            "missing": {},
            "network": figures["fused"] | {"seconds": 0.08, "quartiles": [0.08, 0.08]},
            "fastest_peer": "compile",
            "ratio": compiled / 0.1,
            "loss_shares": {"fused": 0.2, "compile": 1 - 0.08 / compiled},
            "error": None,
        }

    won, lost = step("step_beta_tcvae", 0.5, 0.4), step("step_iwae_mnist", 0.12, 0.09)
    return record | {"steps": [won, lost, step("step_dreamer_kl", 0.2, 0.0999)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_row_equals_eager(row: Row, dtype: torch.dtype, device: torch.device):
    """Value and every gradient, against float64; and eager, as it is timed, gives tensors of the same kind."""
    case = harness.Case(shrunk(row), device, dtype)
    case.check()
    fused, eager = (case.step(case.function(name))() for name in (harness.FUSED, harness.EAGER))
    for ours, theirs in zip(_tensors(fused), _tensors(eager), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for item in outputs for t in _tensors(item)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda real, fake: 1.0001 * ROWS["logits_64"].eager(real, fake), "output 0"),
        (lambda real, fake: ROWS["logits_64"].eager(real, fake.detach()) + 0 * fake.sum(), "gradient of input 1"),
        (lambda real, fake: math.nan * ROWS["logits_64"].eager(real, fake), "output 0"),
        (lambda real, fake: ROWS["logits_64"].eager(real, fake).expand(2), "shape"),
    ],
    ids=["value", "gradient", "nan", "shape"],
)
def test_wrong_code_is_not_timed(wrong: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "time_steps", lambda *_: pytest.fail("timed"))
    row = dataclasses.replace(ROWS["logits_64"], fused=wrong)
    result = harness.measure(row, CPU, torch.float32, 0.0, False, {"memory": 1.0})
    assert message in result["error"] and result["ratio"] is None


def test_one_row_through_the_command_line(device, small_copies, tmp_path: Path, capsys):
    path = tmp_path / "figures.json"
    options = ["--rows", "gaussian_kl_tiny", "--dtype", "float32", "--no-compile", "--seconds", "0.2"]
    assert bench.main([*options, "--device", device.type, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"]["type"] == device.type and record["device"]["name"]
    assert all(rate > 0 for rate in record["copy_bandwidth"].values())
    assert any("cpu" in line for line in record["kernels"])
    (row,) = record["rows"]
    assert row["error"] is None and row["missing"] == {} and set(row["contestants"]) == {"fused", "eager"}
    for figures in row["contestants"].values():
        first, third = figures["quartiles"]
        assert 0 < first <= figures["seconds"] <= third < math.inf
        assert figures["rounds"] >= 6 and figures["peak_bytes"] > 0
    fused, eager = (row["contestants"][name]["seconds"] for name in ("fused", "eager"))
    assert row["fastest_peer"] == "eager" and row["ratio"] == pytest.approx(eager / fused)
    # two inputs and their gradients of 128 x 10 floats, the loss and its gradient
    assert row["floor_bytes"] == 4 * 128 * 10 * 4 + 2 * 4
    assert 0 < row["copy_share"] < math.inf
    assert "gaussian_kl_tiny" in capsys.readouterr().out


def test_an_error_is_shown_and_is_the_exit_status(small_copies, monkeypatch, capsys):
    wrong = dataclasses.replace(ROWS["logits_64"], fused=lambda real, fake: 2 * ROWS["logits_64"].eager(real, fake))
    monkeypatch.setitem(ROWS, "logits_64", wrong)
    options = ["--rows", "logits_64,logits_64_generator", "--no-compile", "--seconds", "0", "--device", "cpu"]
    assert bench.main(options) == 1
    out = capsys.readouterr().out
    assert "ERROR  AssertionError: output 0" in out and "1 rows with an ERROR" in out and "of 1 rows" in out


def test_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--rows", "no_such_row"])
    assert "no row 'no_such_row'" in capsys.readouterr().err


def test_a_peer_that_cannot_run_is_named(monkeypatch, record):
    def compile(eager: Any, **_: Any) -> Any:
        def fail(*_: Any) -> Any:
            raise RuntimeError("no compiler\nat all")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    row = harness.measure(shrunk(ROWS["logits_64"]), CPU, torch.float32, 0.0, True, {"memory": 1e9})
    assert row["missing"] == {"compile": "RuntimeError: no compiler"} and row["fastest_peer"] == "eager"
    assert "no compile: RuntimeError: no compiler" in report.line(record, row)


def test_peak_memory(device):
    """Two megabytes at once, the second of which is freed again; what was there before does not count."""
    before = torch.ones(2**20, device=device)

    def step() -> torch.Tensor:
        freed = before[: 2**18].neg()
        return freed.neg()

    assert harness.peak_bytes(step, device) == 2 * 2**20


# ---- whole training steps --------------------------------------------------------------------------------------------


def test_every_step_has_a_small_form():
    assert SMALL_STEPS.keys() == steps.STEPS.keys()


@pytest.mark.parametrize("step", SMALL_STEPS.values(), ids=list(SMALL_STEPS))
@pytest.mark.usefixtures("fresh_dynamo")
def test_training_step(step: steps.TrainingStep, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """Every contestant updates parameters of its own with the same gradients, step after step; also without a loss."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compiler(f, backend=graphs, **options))
    training = steps.Training(step, device)
    training.check()
    before = [p.clone() for p in training.networks.parameters()]
    updates: list[list[torch.Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        updates.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    hook = register_optimizer_step_pre_hook(keep)
    try:
        for contestant in ("fused", "eager", "network"):
            torch.manual_seed(0)
            train = training.run(contestant)
            for _ in range(2):
                torch.manual_seed(0)
                train()
    finally:
        hook.remove()
    assert graphs.frame_count == (2 if step.one_graph else 0)  # ours with the networks, and these alone
    fused, *others = updates
    assert len(fused) == len(before) and len(others) == 5
    for other in others:
        for got, want in zip(fused, other, strict=True):
            assert (got - want).abs().max() <= 1e-3 * want.abs().max()
    for p, first in zip(training.networks.parameters(), before, strict=True):
        assert p.grad is None and torch.equal(p, first)


def _detached_logits(logits: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return IWAE.eager(logits.detach(), *others) + 0 * logits.sum()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fused": lambda *outputs: 1.001 * IWAE.eager(*outputs)}, "loss: fused differs from eager"),
        ({"fused": _detached_logits}, "gradient of encoder.0.weight: fused differs"),
        ({"fused": lambda *outputs: math.nan * IWAE.eager(*outputs)}, "loss: fused differs"),
        ({"fused": _detached_logits, "eager": _detached_logits}, "gradient of decoder.0.weight: 0.0 throughout"),
    ],
    ids=["value", "gradient", "nan", "zero"],
)
def test_wrong_step_is_not_timed(wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "time_steps", lambda *_: pytest.fail("timed"))
    result = steps.measure(dataclasses.replace(IWAE, **wrong), CPU, 0.0, False)
    assert message in result["error"] and result["ratio"] is None


def test_figures_of_a_step(monkeypatch):
    """Only the loss lines are compiled; networks alone are no peer, and a share is never below zero."""
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    seconds = {"fused": 2.0, "eager": 5.0, "compile": 4.0, "network": 3.0}

    def time_steps(run: dict[str, harness.Step], *_: Any) -> dict[str, dict[str, Any]]:
        assert run.keys() == seconds.keys()
        return {name: {"seconds": seconds[name]} for name in run}

    monkeypatch.setattr(harness, "time_steps", time_steps)
    result = steps.measure(IWAE, CPU, 0.0, True)
    assert result["error"] is None and compiled == [IWAE.eager]
    assert result["contestants"].keys() == {"fused", "eager", "compile"} and result["network"]["seconds"] == 3
    assert result["fastest_peer"] == "compile" and result["ratio"] == 2
    assert result["loss_shares"] == {"fused": 0.0, "compile": 0.25}


@pytest.mark.parametrize(("option", "rows"), [("--steps", 0), ("--all", 1)])
def test_steps_through_the_command_line(option, rows, device, small_copies, tmp_path: Path, monkeypatch, capsys):
    wrong = dataclasses.replace(IWAE, name="step_wrong", fused=lambda *outputs: 2 * IWAE.eager(*outputs))
    monkeypatch.setattr(steps, "STEPS", {"step_iwae_mnist": IWAE})
    path = tmp_path / "figures.json"
    options = [option, "--rows", "logits_64", "--dtype", "float32", "--no-compile", "--seconds", "0"]
    options += ["--device", device.type, "--json", str(path)]
    assert bench.main(options) == 0
    record = json.loads(path.read_text())
    assert len(record["rows"]) == rows
    (step,) = record["steps"]
    assert step["error"] is None and set(step["contestants"]) == {"fused", "eager"}
    for figures in (*step["contestants"].values(), step["network"]):
        first, third = figures["quartiles"]
        assert 0 < first <= figures["seconds"] <= third < math.inf
        assert figures["rounds"] >= 6 and figures["peak_bytes"] > 0
    out = capsys.readouterr().out
    assert "step_iwae_mnist" in out and ("logits_64" in out) == (rows == 1)
    steps.STEPS["step_wrong"] = wrong
    assert bench.main(options) == 1
    out = capsys.readouterr().out
    assert "ERROR  AssertionError: loss" in out and "1 steps with an ERROR" in out


def test_no_picture_of_steps(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--steps", "--plot", str(tmp_path / "steps.png")])
    assert "--plot draws rows" in capsys.readouterr().err


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_table(record):
    text = report.table(record)
    won, lost = (
        next(line for line in text.splitlines() if name in line) for name in ("logits_64", "gaussian_kl_large")
    )
    assert "20.0 µs ±15%" in won and "50.0 µs" in won and "2.50×" in won and "50%*" in won and "SLOWER" not in won
    assert "1.0 KiB / 4.0 KiB" in won  # memory is held against the same peer as the time
    assert "0.75×" in lost and lost.endswith("SLOWER") and "(bfloat16)" in lost
    assert "faster in 1 of 2 rows; geometric mean 1.37×" in text


def test_stars_are_held_to_their_bar(record):
    """Their own mean, and those that hold more than half of the faster peer's memory without being results alone."""
    won = record["rows"][0]
    record["rows"] = [{**won, "row": name} for name in ("mmd_1024", "zinb_2000", "logits_64")]
    ours = [row["contestants"]["fused"] for row in record["rows"]]
    record["rows"][0]["contestants"] = {**won["contestants"], "fused": {**ours[0], "peak_bytes": 3000 + 5000}}
    record["rows"][1] |= {"ratio": 5.0, "result_bytes": 1000}
    text = report.closing(record)
    assert "geometric mean 3.15×, of those with a star 3.54×; slowest mmd_1024 ★ 2.50×" in text
    assert text.splitlines()[2].endswith("; an exception is mmd_1024 ★ (no reason)")
    lines = [line for line in report.table(record).splitlines() if "2.0 KiB" in line or "KiB†" in line]
    assert len(lines) == 2 and all("1.0 KiB / 4.0 KiB†" in line for line in lines)
    record["rows"][1] |= {"result_bytes": 10, "contestants": record["rows"][0]["contestants"]}
    assert "; an exception is zinb_2000 ★ (theta's gradient has" in report.closing(record)


def test_copies(record):
    """A step that takes as long as four copies, of which the first finds its target in no cache where that is new."""
    x = torch.ones(1 << 20, requires_grad=True)
    target = torch.empty_like(x)

    def four_copies() -> torch.Tensor:
        for _ in range(4):
            target.detach().copy_(x.detach())
        return target

    found = harness.copies(four_copies, x)
    assert 2 < found["exists"] < 8 and found["new"] > 2
    # of which all but the first find their tensors in a cache
    assert 1.3 < harness.copies_from_memory(lambda: [four_copies() for _ in range(2)], [x] * 3) < 16
    record["rows"][0]["copies"] = {"memory": 1.25, "exists": 1.5, "new": 1.75}
    for text in (report.table(record), report.markdown(record)):
        assert text.count("as long as 1.25 copies of its first input when both read from memory, 1.50 when") == 1


def test_inputs_that_outgrow_a_cache() -> None:
    """Each step takes another set, of the same shapes and other numbers."""
    case = harness.Case(ROWS["logits_64"], CPU, torch.float32)
    case.outgrow(3 * case.floor_bytes)
    first = case.first_inputs
    assert len(first) == 3 and not torch.equal(first[0], first[1])
    seen = []
    step = case.step(lambda *inputs: seen.append(inputs[0]) or case.row.eager(*inputs))
    for _ in range(4):
        step()
    assert [x is y for x, y in zip(seen, [*first, first[0]], strict=True)] == [True] * 4


def test_table_of_steps(record, record_of_steps):
    assert "training step" not in report.table(record)
    text = report.table(record_of_steps)
    won, lost = (next(line for line in text.splitlines() if name in line) for name in ("tcvae", "iwae_mnist"))
    assert won.count("±15%") == 3 and "SLOWER" not in won
    assert won.split() == (
        "step_beta_tcvae 100 ms ±15% 500 ms ±15% 400 ms ±15% 80.0 ms ± 0% 4.00× 20% / 80% 1.0 KiB / 4.0 KiB".split()
    )
    assert "0.90×" in lost and "20% / 11%" in lost and lost.endswith("SLOWER")
    record_of_steps["steps"][0]["missing"] = {"compile": "RuntimeError: no compiler"}
    assert "no compile: RuntimeError: no compiler" in report.table(record_of_steps)


def test_two_runs_agree_within_their_spread(record, tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    paths[0].write_text(json.dumps(record))
    for factor, status in ((1.5, 0), (2.0, 1)):  # each time's quartiles are 15 % apart: the two ratios by up to 60 %
        other = copy.deepcopy(record)
        other["rows"][0]["ratio"] *= factor
        paths[1].write_text(json.dumps(other))
        assert bench.main(["--compare", *map(str, paths)]) == status
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split()[1:5] == ["2.50×", f"{2.5 * factor:.2f}×", f"{100 * math.log(factor):.0f}%", "60%"]
        assert lines[1].endswith("APART") == bool(status)
        assert lines[-1].startswith(f"{2 - status} of 2 rows agree")


def test_a_row_is_the_median_of_its_passes(record):
    """Of each ratio, and its spread has half of what lies between them."""
    passes = [copy.deepcopy(record["rows"][0]) for _ in range(3)]
    for of_pass, factor in zip(passes, (1.0, 3.0, 1.5), strict=True):
        times = of_pass["contestants"]
        for name in ("eager", "compile"):
            times[name] |= {"seconds": factor * times[name]["seconds"], "quartiles": [times[name]["seconds"]] * 2}
    passes[1]["copies"] = passes[0]["copies"] = passes[2]["copies"] = None
    row = harness.merged(passes)
    assert row["ratios"] == pytest.approx([2.5, 7.5, 3.75])
    assert row["ratio"] == pytest.approx(3.75) and row["contestants"]["fused"]["rounds"] == 27
    within = report._spread({**row, "ratios": [1.0]})
    assert report._spread(row) == pytest.approx(within + math.log(3) / 2)
    passes[2]["error"] = "RuntimeError: no"
    assert harness.merged(passes) is passes[2]


def test_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str], small_copies: None) -> None:
    path = tmp_path / "figures.json"
    options = ["--rows", "iwgan_generator_64", "--no-compile", "--seconds", "0", "--device", "cpu"]
    assert bench.main([*options, "--passes", "2", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["passes"] == 2
    (row,) = written["rows"]
    assert len(row["ratios"]) == 2 and row["ratio"] == pytest.approx(sum(row["ratios"]) / 2)
    assert capsys.readouterr().out.count("iwgan_generator_64  ") == 1
    with pytest.raises(SystemExit):
        bench.main([*options, "--passes", "0"])


def test_table_of_a_gpu(record):
    record["device"] = {"type": "cuda", "name": "H100"}
    for row in record["rows"]:
        for name, times in {"fused": (8e-6, 1e-6), "eager": (1.6e-5, 4e-6), "compile": (1.2e-5, 3e-6)}.items():
            row["contestants"][name] |= {"host_seconds": times[0], "device_seconds": times[1]}
    autotuned = {"seconds": 4e-5, "host_seconds": 2e-5, "device_seconds": 2e-6}
    row = record["rows"][0]
    row["contestants"]["compile_autotune"] = row["contestants"]["compile"] | autotuned
    row |= {"fastest_peer": "compile_autotune", "ratio": 2.0}
    text = report.table(record)
    won = next(line for line in text.splitlines() if "logits_64" in line)
    assert "40.0 µs" in won and "50.0 µs" not in won  # the better of the two modes
    assert won.split().count("2.00×") == 2 and "2.50×" in won  # in all and on the device; until the calls return


def test_words():
    assert [report.duration(t) for t in (1.234e-6, 4.56e-5, 7.89e-4, 1.5e-3, 0.25, 2.0)] == [
        "1.23 µs",
        "45.6 µs",
        "789 µs",
        "1.50 ms",
        "250 ms",
        "2.00 s",
    ]
    assert [report.size(n) for n in (12, 2048, 3 * 2**20, 2**30)] == ["12 B", "2.0 KiB", "3.0 MiB", "1.0 GiB"]
    assert describe_shapes([(64, 1), (64, 1), (3,)]) == "2 × [64, 1], [3]"


def _readme(tmp_path: Path, text: str, record: dict[str, Any]) -> Path:
    results = tmp_path / "benches" / "results"
    results.mkdir(parents=True)
    (results / "cpu.json").write_text(json.dumps(record))
    readme = tmp_path / "README.md"
    readme.write_text(text)
    return readme


def test_the_integrations_tables_are_those_measured(tmp_path):
    root = Path(__file__).parents[1]
    page = tmp_path / "integrations.md"
    text = (root / "docs" / "integrations.md").read_text()
    page.write_text(text.replace("| `BetaTCVAE.loss_function` |", "| `another` |"))
    subprocess.run([sys.executable, root / "benches" / "integrations.py", "--readme", page], check=True)
    assert "| `BetaTCVAE.loss_function` |" in text and page.read_text() == text


def test_readme_is_brought_up_to_date_once(tmp_path, record):
    pytest.importorskip("matplotlib")
    readme = _readme(tmp_path, "before\n<!-- bench:cpu -->\nstale\n<!-- /bench -->\nafter\n", record)
    assert bench.main(["--readme", str(readme)]) == 0
    once = readme.read_text()
    assert once.startswith("before\n<!-- bench:cpu -->\n| row |") and once.endswith("\n<!-- /bench -->\nafter\n")
    assert "stale" not in once and "of the ratios of 3 passes" in once
    assert "| 2.50× |" in once and "| **0.75× (slower)** |" in once and "| 50%\\* |" in once
    for picture in ("cpu.png", "cpu_floors.png"):
        assert (tmp_path / "benches" / "results" / picture).read_bytes().startswith(b"\x89PNG")
    assert bench.main(["--readme", str(readme)]) == 0
    assert readme.read_text() == once


def test_readme_takes_steps(tmp_path, record_of_steps):
    readme = _readme(tmp_path, "before\n<!-- steps:cpu -->\nold\n<!-- /steps -->\nafter\n", record_of_steps)
    assert bench.main(["--readme", str(readme)]) == 0
    once = readme.read_text()
    assert once.startswith("before\n<!-- steps:cpu -->\n| training step |")
    assert once.endswith("\n<!-- /steps -->\nafter\n") and "old" not in once
    sizes = steps.STEPS["step_beta_tcvae"].sizes
    assert f" | {sizes} | 100 ms | 500 ms | 400 ms | 80.0 ms | 4.00× | 20% / 80% | 1.0 KiB / 4.0 KiB |" in once
    assert "| **0.90× (slower)** | 20% / 11% |" in once and "| 1.00× | 20% / 20% |" in once
    assert not (tmp_path / "benches" / "results" / "cpu.png").exists()  # it shows rows
    assert bench.main(["--readme", str(readme)]) == 0
    assert readme.read_text() == once


def test_pages_beside_readme_are_brought_up_to_date(tmp_path, record_of_steps, capsys):
    readme = _readme(tmp_path, "no markers\n", record_of_steps)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("<!-- models -->\nold\n<!-- /models -->\n<!-- steps:cpu -->\n<!-- /steps -->\n")
    assert bench.main(["--readme", str(readme)]) == 0
    assert readme.read_text() == "no markers\n"
    assert page.read_text().startswith(f"<!-- models -->\n{models.table()}\n<!-- /models -->\n")
    assert "| training step |" in page.read_text()
    assert capsys.readouterr().out.splitlines() == [f"{page}: models", f"{page}: steps:cpu"]


def test_headline(tmp_path, record_of_steps):
    """Three figures, of the steps and of the libraries'."""
    lost = record_of_steps["steps"][1]
    record_of_steps["steps"] += [{**lost, "step": f"step_compiled_{name}"} for name in ("elbo", "discriminator")]
    readme = _readme(tmp_path, "<!-- headline:cpu -->\nold\n<!-- /headline -->\n", record_of_steps)
    figures = {"original": 4e-3, "fused": 2e-3, "faster_by": 1.9}
    libraries = [{"name": name, **figures} for name in ("scvi-zinb", "pythae-VAE-bce")]
    path = tmp_path / "benches" / "results" / "integrations.json"
    path.write_text(json.dumps({"date": "2026-02-03T04:05:06", "steps": libraries}))
    assert bench.main(["--readme", str(readme)]) == 0
    tcvae, scvi, little = readme.read_text().splitlines()[1:4]
    assert "4.00×" in tcvae and "100 ms" in tcvae and "400 ms" in tcvae and "1.0 KiB instead of 4.0 KiB" in tcvae
    assert "1.90×" in scvi and "2.00 ms instead of 4.00 ms" in scvi
    assert little.count("0.90×") == 2 and "1.90×" in little
    assert "(libraries: 2026-02-03)" in readme.read_text()
    record_of_steps["steps"][0]["error"] = "AssertionError: loss"
    (tmp_path / "benches" / "results" / "cpu.json").write_text(json.dumps(record_of_steps))
    with pytest.raises(ValueError, match="step_beta_tcvae: AssertionError"):
        bench.main(["--readme", str(readme)])


@pytest.mark.parametrize("change", ["none", "error"])
def test_readme_takes_no_steps_that_are_none(change, tmp_path, record_of_steps):
    if change == "none":
        del record_of_steps["steps"]
    else:
        record_of_steps["steps"][1]["error"] = "AssertionError: loss"
    text = "<!-- steps:cpu -->\n<!-- /steps -->\n"
    readme = _readme(tmp_path, text, record_of_steps)
    with pytest.raises(ValueError, match="--all" if change == "none" else "step_iwae_mnist: AssertionError"):
        bench.main(["--readme", str(readme)])
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "no markers\n",
        "<!-- steps:cpu -->\n<!-- /bench -->\n",
        "<!-- bench:cpu -->\n<!-- steps:cpu -->\n<!-- /steps -->\n<!-- /bench -->\n",
        "<!-- bench:cpu -->\nnever closed\n",
        "<!-- bench:cpu -->\n<!-- bench:cpu -->\n<!-- /bench -->\n",
        "<!-- bench:cpu --> not on a line of its own <!-- /bench -->\n",
        "<!-- bench:cpu -->\n<!-- /bench -->\nstray <!-- /bench -->\n",
    ],
)
def test_readme_without_its_markers_is_refused(text, tmp_path, record):
    readme = _readme(tmp_path, text, record)
    with pytest.raises(ValueError, match="expected pairs of lines"):
        bench.main(["--readme", str(readme)])
    assert readme.read_text() == text


def test_readme_takes_no_errors_and_no_missing_figures(tmp_path, record):
    text = "<!-- bench:cpu -->\n<!-- /bench -->\n"
    record["rows"][0]["error"] = "AssertionError: output 0"
    readme = _readme(tmp_path, text, record)
    with pytest.raises(ValueError, match="logits_64: AssertionError"):
        bench.main(["--readme", str(readme)])
    (tmp_path / "benches" / "results" / "cpu.json").unlink()
    with pytest.raises(FileNotFoundError):
        bench.main(["--readme", str(readme)])
    assert readme.read_text() == text
