"""Each library's own loss, and a training step of its own models, with the original functions and with the fused ones.

    python benches/integrations.py --json benches/results/integrations.json
    python benches/integrations.py --readme docs/integrations.md

One process and one model a row. Short runs without and with the patch take turns, and swap their order each time; the
report is the median of these runs, and the median of the ratios of their pairs. Patching is not timed. Needs the
libraries that `make test-integrations` installs. The second form puts the tables into that file, between
`<!-- integrations:losses -->` or `<!-- integrations:steps -->` and `<!-- /integrations -->`.
"""

import argparse
import importlib.metadata
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import unigen_fast as uf
from unigen_fast.bench import harness, new_record, report

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TURNS, SECONDS = 8, 0.25  # of a run


def alternated(run: Callable[[], object], library: str) -> dict[str, Any]:
    """Seconds a call takes with the original function and with the fused one, and the ratio of the two."""
    seconds: dict[str, list[float]] = {"original": [], "fused": []}
    calls = 0
    for turn in range(TURNS):
        for side in list(seconds)[:: 1 if turn % 2 else -1]:
            with uf.integrations.patched(library) if side == "fused" else nullcontext():
                run()
                if not calls:
                    start = time.perf_counter()
                    run()
                    calls = max(1, round(SECONDS / (time.perf_counter() - start)))
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                seconds[side].append((time.perf_counter() - start) / calls)
    assert sum(uf.integrations.calls(library).values()) > 0, f"{library}: the fused function did not run"
    ratios = [original / fused for original, fused in zip(*seconds.values(), strict=True)]
    figures: dict[str, Any] = {side: statistics.median(found) for side, found in seconds.items()}
    return figures | {"faster_by": statistics.median(ratios), "ratios": sorted(ratios)}


# ---- the losses ------------------------------------------------------------------------------------------------------


def losses() -> list[tuple[str, str, str, Any]]:
    """(library, function, sizes, how it is called); the sizes are those of its users."""
    import test_numbers as numbers
    from test_numbers import Setup, draw, positive

    def pythae(kind: str, *middle: int, batch: int, latent: int, more: tuple[Any, ...] = (), **options: Any) -> Setup:
        numbers.B, numbers.D = batch, latent
        numbers.K, numbers.M = (*reversed(middle), 1, 1)[:2]
        setup = numbers.pythae_setup(numbers.pythae(kind, **options), *middle, more=more, pixels=(1, 28, 28))
        if middle:
            return setup
        setup.tensors[0] = setup.tensors[0].detach().requires_grad_()
        return setup

    def vae(kind: str) -> Setup:
        setup = pythae(kind, batch=100, latent=32)
        setup.tensors.pop()
        return setup._replace(call=lambda f, r, m, v: setup.call(f, r, m, v, None))

    def beta_tc_vae() -> Setup:
        numbers.B, numbers.D, numbers.PIXELS = 256, 10, 784
        return numbers.pythae_beta_tc_vae(stratified=True, size=60_000)

    def mmvae() -> Setup:
        numbers.B, numbers.K, numbers.D = 64, 10, 64
        return numbers.modalities()

    def counts(with_gate: bool) -> Setup:
        x = numbers.counts((128, 2000))
        tensors = [positive(128, 2000), positive(2000)] + [draw(128, 2000)] * with_gate
        return Setup(lambda f, *given: f(x, *given), tensors)

    def normals(independent: bool) -> Setup:
        if independent:
            return numbers.independent_normals(1)._replace(tensors=[draw(512, 64), positive(512, 64)] * 2)
        return numbers.normals()._replace(tensors=[draw(512, 64), positive(512, 64), draw(64), positive(64)])

    def logits(*shape: int, count: int = 2) -> Setup:
        return Setup(lambda f, *given: f(*given), [draw(*shape) for _ in range(count)])

    patches = "2 × [12, 1, 30, 30]"
    return [
        ("torchrl", "categorical_kl_terms", "2 × [16, 64, 32, 32]", logits(16, 64, 32, 32)),
        ("pythae", "VAE.loss_function", "[100, 784], latent 32", vae("bce")),
        ("pythae", "IWAE.loss_function", "[100, 50, 784], latent 32", pythae("mse", 50, batch=100, latent=32)),
        (
            "pythae",
            "CIWAE.loss_function",
            "[100, 50, 784], latent 32",
            pythae("mse", 50, batch=100, latent=32, beta=0.3),
        ),
        ("pythae", "MIWAE.loss_function", "[100, 5, 10, 784], latent 32", pythae("mse", 5, 10, batch=100, latent=32)),
        ("pythae", "PIWAE.loss_function", "[100, 5, 10, 784], latent 32", pythae("mse", 5, 10, batch=100, latent=32)),
        ("pythae", "BetaTCVAE.loss_function", "[256, 784], latent 10", beta_tc_vae()),
        ("diffusers", "DiagonalGaussianDistribution.kl", "[8, 8, 32, 32]", numbers.diffusers_kl((8, 8, 32, 32))),
        (
            "diffusers",
            "DiagonalGaussianDistribution.sample",
            "[8, 8, 32, 32]",
            numbers.diffusers_sample((8, 8, 32, 32)),
        ),
        ("scvi", "log_nb_positive", "[128, 2000]", counts(False)),
        ("scvi", "log_zinb_positive", "[128, 2000]", counts(True)),
        ("torch_distributions", "_kl_normal_normal", "[512, 64]", normals(False)),
        ("torch_distributions", "_kl_independent_independent", "[512, 64]", normals(True)),
        ("multivae", "MMVAE.dreg_looser", "2 × [10, 64], latent 64", mmvae()),
        ("multivae", "MMVAE.iwae_looser", "2 × [10, 64], latent 64", mmvae()),
        ("multivae", "kl_divergence", "4 × [128, 64]", logits(128, 64, count=4)),
        ("taming", "hinge_d_loss", patches, logits(12, 1, 30, 30)),
        ("taming", "vanilla_d_loss", patches, logits(12, 1, 30, 30)),
        ("torchgan", "minimax_discriminator_loss", "2 × [64]", logits(64)),
        ("torchgan", "least_squares_discriminator_loss", "2 × [64]", logits(64)),
        ("torchgan", "wasserstein_discriminator_loss", "2 × [64]", logits(64)),
        ("mimicry", "minimax_loss_dis", "2 × [64, 1]", logits(64, 1)),
        ("mimicry", "hinge_loss_dis", "2 × [64, 1]", logits(64, 1)),
    ]


def measured_loss(library: str, name: str, sizes: str, setup: Any) -> dict[str, Any]:
    """Forward and backward from what the function returns first, or from both of torchrl's terms."""
    import test_numbers as numbers

    holder, last, _ = numbers.find(library, name)

    def run() -> None:
        outputs = numbers.flat(setup.call(vars(holder)[last], *setup.tensors))
        trained = [x.sum() for x in outputs[: 2 if library == "torchrl" else 1]]
        torch.autograd.grad(trained, setup.tensors)

    figures = {"library": library, "name": name, "sizes": sizes} | alternated(run, library)
    figures["peak_bytes"] = {"original": harness.peak_bytes(run, CPU)}
    with uf.integrations.patched(library):
        figures["peak_bytes"]["fused"] = harness.peak_bytes(run, CPU)
    return figures


def measured_step(label: str) -> dict[str, Any]:
    import training

    library, make = training.TRAININGS[label]
    torch.manual_seed(0)
    step, data = make().step, itertools.cycle(training.batches(8))
    return {"library": library, "name": label} | alternated(lambda: step(next(data)), library)


# ---- reports ---------------------------------------------------------------------------------------------------------


def _faster(figures: Mapping[str, Any]) -> str:
    return f"{figures['faster_by']:.2f}×"


def origin(record: Mapping[str, Any]) -> str:
    pairs = len(record["rows"][0]["ratios"])
    return (
        f"{report.origin(record)} Times are medians of {pairs} runs; *faster by* is the median ratio of {pairs} "
        "pairs of runs that took turns, which is not the quotient of the medians where the machine's speed drifts."
    )


def table_of_losses(record: Mapping[str, Any]) -> str:
    lines = ["| library | function | tensors | original | fused | faster by | peak memory: original / fused |"]
    lines.append("|---|---|---|--:|--:|--:|--:|")
    for row in record["rows"]:
        times = f"{report.duration(row['original'])} | {report.duration(row['fused'])} | {_faster(row)}"
        memory = " / ".join(report.size(row["peak_bytes"][side]) for side in ("original", "fused"))
        lines.append(f"| {row['library']} | `{row['name']}` | {row['sizes']} | {times} | {memory} |")
    return "\n".join([*lines, "", origin(record)])


def table_of_steps(record: Mapping[str, Any]) -> str:
    lines = ["| training step | original | fused | faster by |", "|---|--:|--:|--:|"]
    for row in record["steps"]:
        times = f"{report.duration(row['original'])} | {report.duration(row['fused'])} | {_faster(row)}"
        lines.append(f"| {row['name']} | {times} |")
    return "\n".join([*lines, "", origin(record)])


TABLES = {"losses": table_of_losses, "steps": table_of_steps}
MARKERS = re.compile(rf"(<!-- integrations:({'|'.join(TABLES)}) -->\n).*?(<!-- /integrations -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--readme", type=Path, help="the file whose tables are written anew; nothing is measured")
    parser.add_argument("--only", default="", help="rows whose name or library contains this")
    options = parser.parse_args()
    if options.readme is not None:
        record = json.loads((ROOT / "benches" / "results" / "integrations.json").read_text())
        text = MARKERS.sub(lambda m: f"{m[1]}{TABLES[m[2]](record)}\n{m[3]}", options.readme.read_text())
        options.readme.write_text(text)
        return
    sys.path[:0] = [str(ROOT / "tests" / "integrations"), str(ROOT / "tests")]
    import conftest  # of tests/integrations: imports libraries that import what is not there
    import training

    conftest.pytest_configure(None)
    harness.keep_freed_memory()
    record = new_record(CPU, TURNS * SECONDS)

    def keep(kind: str, figures: dict[str, Any]) -> None:
        record[kind].append(figures)
        spread = f"{figures['ratios'][0]:.2f} to {figures['ratios'][-1]:.2f}"
        print(f"{figures['library']:<20} {figures['name']:<40} {_faster(figures)} ({spread})", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    for loss in losses():
        if options.only in f"{loss[0]} {loss[1]}":
            keep("rows", measured_loss(*loss))
    for label in training.TRAININGS:
        if options.only in label:
            keep("steps", measured_step(label))
    names = {"scvi": "scvi-tools", "pyro": "pyro-ppl", "taming": "taming-transformers", "mimicry": "torch-mimicry"}
    for library in {row["library"] for row in record["rows"] + record["steps"]} - {"torch_distributions"}:
        record["versions"][library] = importlib.metadata.version(names.get(library, library))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
