"""The demo from training to pictures."""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import unigen_fast as uf
from unigen_fast import _command_line
from unigen_fast.demo import costs, evaluate, plots, train
from unigen_fast.demo.data import load_digits
from unigen_fast.demo.networks import LATENT, Networks, networks
from unigen_fast.demo.train import MODELS, observed

STEPS = 1500
BATCH_SIZE = 64
GENERATED = 5000  # digits that the sample-quality score is computed on
BOUNDS_ON = 4  # bounds are of every fourth held-out digit: 500 samples of each take these networks a while


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole demo; returns what it writes to results.json."""
    began = time.perf_counter()
    output: Path = arguments.output
    steps = max(1, round(STEPS * arguments.steps_scale))

    def progress(n: int, title: str) -> Iterable[int]:
        return _command_line.progress(range(n), title, quiet=arguments.quiet)

    def seed() -> None:
        torch.manual_seed(arguments.seed)

    print(uf.info())
    digits = load_digits(arguments.test_digits // 10, arguments.device)
    bounded = digits.test_binary[::BOUNDS_ON]
    print(f"{len(digits.train)} MNIST digits to train on, {len(digits.test)} held out; batches of {BATCH_SIZE}")

    # ---- training
    made: dict[str, Networks] = {}
    models: dict[str, Any] = {}
    curves: dict[str, train.Curve] = {}
    for name, of_networks in MODELS.items():
        seed()
        made[name] = networks(arguments.device)
        models[name] = of_networks(made[name], uf.models)
        curves[name] = train.train(
            models[name], digits.train, lambda model: evaluate.on_the_way(model, bounded, BATCH_SIZE),
            steps=steps, batch_size=BATCH_SIZE, progress=progress, title=name,
        )  # fmt: skip
        print(f"{name:<6} {steps} steps in {curves[name]['seconds'][-1]:.1f} s")

    # ---- evaluation
    seed()
    start = time.perf_counter()
    classifier, accuracy = evaluate.train_classifier(digits, progress=progress)
    z = torch.randn(GENERATED, LATENT).to(arguments.device)
    generated = {name: evaluate.generate(found.generator, z) for name, found in made.items()}
    quality: dict[str, dict[str, float]] = {}
    bounds: dict[str, evaluate.Bounds] = {}
    for name, model in models.items():
        quality[name] = {"classifier_score": evaluate.classifier_score(classifier, generated[name])}
        if "discriminator" in model.phases:
            with torch.no_grad():
                real, fake = (model.discriminator(observed(model, x)) for x in (digits.test, generated[name]))
            quality[name] |= evaluate.discriminated(real, fake)
        if isinstance(model, uf.models.VAE):
            bounds[name] = evaluate.held_out_bounds(model, bounded, progress, f"bounds of {name}")
        else:
            quality[name]["ess_of_batch"] = evaluate.effective_samples(fake, BATCH_SIZE)
    real_score = evaluate.classifier_score(classifier, digits.test)
    print(f"evaluation in {time.perf_counter() - start:.1f} s")

    # ---- values and times against plain PyTorch
    start = time.perf_counter()
    batch = digits.train[torch.randperm(len(digits.train))[:BATCH_SIZE].to(arguments.device)]
    inputs = {name: observed(model, batch) for name, model in models.items()}
    agreement = {name: costs.agreement(name, made[name], x, arguments.seed) for name, x in inputs.items()}
    cost, extra = costs.measure(made, inputs, max(3, round(80 * min(1.0, arguments.steps_scale))), progress)
    print(f"comparison with plain PyTorch in {time.perf_counter() - start:.1f} s")

    # ---- pictures
    seed()
    with torch.no_grad():
        shown = digits.test_binary[:: max(1, len(digits.test) // 20)][:20]
        reconstructed = {name: made[name].generator(made[name].encoder(shown)[0]).sigmoid() for name in bounds}
        x = models["IWGAN"].sample(BATCH_SIZE)
        logits = made["IWGAN"].discriminator(x)
        aavae = made["AAVAE"].discriminator
        of_aavae = {"data": inputs["AAVAE"][:32], "samples": models["AAVAE"].sample(32)}
        d = {side: aavae(digits).sigmoid() for side, digits in of_aavae.items()}
    weights, ess = uf.importance_weights(logits, dim=0), uf.effective_sample_size(logits, dim=0).item()
    phases = {
        name: [{"phase": p.name, "updates": p.updates, "minimises": p.minimises} for p in model.phases.values()]
        for name, model in models.items()
    }
    captions = {
        name: f"minimises {of_theta[-1]['minimises']}\n"
        f"classifier score {quality[name]['classifier_score']:.2f} (real: {real_score:.2f})"
        + (f", held-out log p(x) ≈ {bounds[name].log_likelihood:.1f} nats" if name in bounds else "")
        for name, of_theta in phases.items()
    }
    plots.samples(generated, captions, output / "samples.png")
    plots.reconstructions({"held out": shown} | reconstructed, output / "reconstructions.png")
    plots.bounds({name: curves[name] for name in bounds}, output / "bounds.png")
    plots.adversaries(curves, BATCH_SIZE, output / "adversaries.png")
    plots.weights(x, weights, ess, of_aavae, d, output / "weights.png")
    plots.costs(cost, extra, output / "costs.png")

    results = {
        "settings": {
            "seed": arguments.seed, "steps": steps, "batch_size": BATCH_SIZE, "device": arguments.device,
            "train_digits": len(digits.train), "test_digits": len(digits.test), "bounds_on_digits": len(bounded),
            "threads": torch.get_num_threads(),
        },
        "info": str(uf.info()).splitlines(),
        "phases": phases,
        "bounds": {name: b._asdict() for name, b in bounds.items()},
        "quality": quality,
        "classifier_accuracy": accuracy,
        "classifier_score_of_real_digits": real_score,
        "agreement": {name: asdict(a) for name, a in agreement.items()},
        "cost": {name: c.as_dict() for name, c in cost.items()},
        "extra_cost": {name: c.as_dict() for name, c in extra.items()},
        "curves": curves,
        "weights": {"IWGAN": weights.tolist(), "AAVAE": {side: values.tolist() for side, values in d.items()}},
    }  # fmt: skip
    results["seconds"] = time.perf_counter() - began
    (output / "results.json").write_text(json.dumps(results, indent=1))
    print(report(results))
    print(f"\n{results['seconds']:.0f} s in all. Pictures and results.json: {output}")
    return results


def report(results: dict[str, Any]) -> str:
    """The tables, from results.json's content."""
    settings, quality = results["settings"], results["quality"]
    lines = ["", "The same two networks, the same initial parameters, one loop; what each phase minimises"]
    for name, phases in results["phases"].items():
        for i, p in enumerate(phases):
            lines.append(f"{name if i == 0 else '':<7}{p['phase']:<15}{p['minimises']}")
    lines += [
        "",
        f"Held-out bounds on log p(x), nats per digit, mean of {settings['bounds_on_digits']} digits (more is better)",
        f"{'':<7}{'ELBO':>9}{'K = 16':>9}{'K = 500':>9}",
    ]
    for name, b in results["bounds"].items():
        lines.append(f"{name:<7}{b['elbo']:>9.2f}{b['iwae']:>9.2f}{b['log_likelihood']:>9.2f}")
    lines += [
        "",
        f"Generated digits: inception-style score, 1 to 10, of a digit classifier that is right on "
        f"{results['classifier_accuracy']:.1%} of the held-out digits",
        f"{'':<7}{'':>9}{'mean of D(x)':>18}{'D is right':>18}   effective samples",
        f"{'':<7}{'score':>9}{'real':>9}{'samples':>9}{'real':>9}{'samples':>9}   "
        f"of a batch of {settings['batch_size']}",
    ]
    for name, q in quality.items():
        line = f"{name:<7}{q['classifier_score']:>9.2f}"
        if "real_accuracy" in q:
            line += f"{q['real_probability']:>9.2f}{q['fake_probability']:>9.2f}"
            line += f"{q['real_accuracy']:>9.0%}{q['fake_accuracy']:>9.0%}"
        if "ess_of_batch" in q:
            line += f"   {q['ess_of_batch']:.1f}" + ("   (its weights are not used)" if name == "GAN" else "")
        lines.append(line)
    lines += [
        f"{'real':<7}{results['classifier_score_of_real_digits']:>9.2f}   (the held-out digits)",
        "VAE, AAVAE: the score is that of the means of p(x|z), D sees samples of it. One run each: scores and bounds "
        "move from seed to seed.",
        "",
        "One training step: unigen_fast against the same step with plain PyTorch losses (medians, measured just now)",
        f"{'':<7}{'losses, ms':>16}{'step, ms':>18}{'losses/step':>18}{'step':>9}{'largest relative difference':>32}",
        f"{'':<7}{'ours':>8}{'plain':>8}{'ours':>10}{'plain':>8}{'ours':>10}{'plain':>8}{'speedup':>9}"
        f"{'of losses':>20}{'gradients':>12}",
    ]
    for name, c in results["cost"].items():
        a = results["agreement"][name]
        lines.append(
            f"{name:<7}{c['loss_ms']:>8.3f}{c['plain_loss_ms']:>8.3f}{c['step_ms']:>10.2f}{c['plain_step_ms']:>8.2f}"
            f"{c['share']:>10.1%}{c['plain_share']:>8.1%}{c['speedup']:>8.2f}x{a['loss']:>20.1e}{a['gradient']:>12.1e}"
        )
    lines += [
        "No step can gain more than the share its losses had; a few percent of a step are the clock's noise.",
        "",
        "What the weights cost: one training step against that of the model without them (medians, by turns)",
    ]
    for name, e in results["extra_cost"].items():
        lines.append(
            f"{name:<7}{e['step_ms']:.2f} ms, {e['over']} {e['over_step_ms']:.2f} ms: {e['ratio']:.2f}x, "
            f"{e['extra_ms']:+.2f} ms; of that weighting {e['parts_ms']['weighting']:.3f} ms, "
            f"{e['weighting_share']:.2%} of the step"
        )
        others = {part: ms for part, ms in e["parts_ms"].items() if part != "weighting"}
        if others:
            lines.append(f"{'':<7}beside it: " + ", ".join(f"{part} {ms:.2f} ms" for part, ms in others.items()))
    verdict = "less" if all(e["weighting_share"] < 0.02 for e in results["extra_cost"].values()) else "NOT less"
    lines.append(f"The weighting itself takes {verdict} than 2 % of the step.")
    return "\n".join(lines)
