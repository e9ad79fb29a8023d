"""The demo from training to pictures."""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import unigen_fast as uf
from unigen_fast.demo import costs, evaluate, plots, train
from unigen_fast.demo.data import load_digits
from unigen_fast.demo.networks import Adversaries, Autoencoder

STEPS = {"VAE": 2000, "IWAE": 2000, "GAN": 1500, "IWGAN": 1500}
BATCH_SIZE = 64
GENERATED = 5000  # digits that the sample-quality score is computed on


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole demo; returns what it writes to results.json."""
    began = time.perf_counter()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    steps = {name: max(1, round(n * arguments.steps_scale)) for name, n in STEPS.items()}
    show_progress = not arguments.quiet and sys.stdout.isatty()

    def progress(n: int, title: str) -> Iterable[int]:
        return tqdm(range(n), desc=title, leave=False, disable=not show_progress)

    def seed() -> None:
        torch.manual_seed(arguments.seed)

    print(uf.info())
    digits = load_digits(arguments.test_digits // 10, arguments.device)
    print(f"{len(digits.train)} MNIST digits to train on, {len(digits.test)} held out; batches of {BATCH_SIZE}")

    # ---- training
    autoencoders: dict[str, Autoencoder] = {}
    adversaries: dict[str, Adversaries] = {}
    bound_curves, adversarial_curves = {}, {}
    for name, step in (("VAE", train.vae_step), ("IWAE", train.iwae_step)):
        seed()
        autoencoders[name] = Autoencoder().to(arguments.device)
        bound_curves[name] = curve = train.train_autoencoder(
            step, autoencoders[name], digits.train, digits.test_binary,
            steps=steps[name], progress=progress, title=name, batch_size=BATCH_SIZE,
        )  # fmt: skip
        print(f"{name:<6} {steps[name]} steps in {curve.seconds[-1]:.1f} s, held-out ELBO {curve.elbo[-1]:.1f} nats")
    for name, adversarial_step in (("GAN", train.gan_step), ("IWGAN", train.iwgan_step)):
        seed()
        adversaries[name] = Adversaries().to(arguments.device)
        adversarial_curves[name] = train.train_adversaries(
            adversarial_step, adversaries[name], digits.train,
            steps=steps[name], progress=progress, title=name, batch_size=BATCH_SIZE,
        )  # fmt: skip
        print(f"{name:<6} {steps[name]} steps in {adversarial_curves[name].seconds:.1f} s")

    # ---- evaluation
    seed()
    start = time.perf_counter()
    bounds = {name: evaluate.held_out_bounds(model, digits.test_binary) for name, model in autoencoders.items()}
    classifier, accuracy = evaluate.train_classifier(digits)
    quality, generated = {}, {}
    for name, model in adversaries.items():
        generated[name], logits = evaluate.generate(model, GENERATED)
        batches = logits[: GENERATED // BATCH_SIZE * BATCH_SIZE].unflatten(0, (-1, BATCH_SIZE))
        quality[name] = {
            "classifier_score": evaluate.classifier_score(classifier, generated[name]),
            "mean_discriminator": logits.sigmoid().mean().item(),
            "ess_of_batch": uf.effective_sample_size(batches, dim=1).mean().item(),
        }
    real_score = evaluate.classifier_score(classifier, digits.test)
    print(f"evaluation in {time.perf_counter() - start:.1f} s")

    # ---- values and times against plain PyTorch
    start = time.perf_counter()
    batch = digits.train[torch.randperm(len(digits.train))[:BATCH_SIZE].to(arguments.device)]
    models: dict[str, Autoencoder | Adversaries] = {**autoencoders, **adversaries}
    inputs = {name: 2 * batch - 1 if name in adversaries else torch.bernoulli(batch) for name in models}
    repeats = max(5, round(60 * min(1.0, arguments.steps_scale)))
    agreement = {name: costs.agreement(name, model, inputs[name], arguments.seed) for name, model in models.items()}
    cost = {name: costs.cost(name, model, inputs[name], repeats) for name, model in models.items()}
    print(f"comparison with plain PyTorch in {time.perf_counter() - start:.1f} s")

    # ---- pictures
    seed()
    with torch.no_grad():
        z = {name: torch.randn(64, model.latent, device=batch.device) for name, model in autoencoders.items()}
        grids = {name: model.decode(z[name]).sigmoid() for name, model in autoencoders.items()}
        shown = digits.test_binary[:: max(1, len(digits.test) // 20)][:20]
        reconstructed = {name: model.decode(model.encode(shown)[0]).sigmoid() for name, model in autoencoders.items()}
    captions = {name: f"held-out log p(x) ≈ {b.log_likelihood:.1f} nats" for name, b in bounds.items()}
    for name, q in quality.items():
        captions[name] = f"classifier score {q['classifier_score']:.2f} (real: {real_score:.2f})"
    x, logits = evaluate.generate(adversaries["IWGAN"], BATCH_SIZE)
    weights, ess = uf.importance_weights(logits, dim=0), uf.effective_sample_size(logits, dim=0).item()
    plots.samples(grids | {name: x[:64] for name, x in generated.items()}, captions, output / "samples.png")
    plots.reconstructions({"held out": shown} | reconstructed, output / "reconstructions.png")
    plots.bounds(bound_curves, output / "bounds.png")
    plots.adversaries(adversarial_curves, BATCH_SIZE, output / "adversaries.png")
    plots.weights(x, weights, ess, output / "weights.png")
    plots.costs(cost, output / "costs.png")

    results = {
        "settings": {
            "seed": arguments.seed, "steps": steps, "batch_size": BATCH_SIZE, "device": arguments.device,
            "train_digits": len(digits.train), "test_digits": len(digits.test), "threads": torch.get_num_threads(),
        },
        "info": str(uf.info()).splitlines(),
        "bounds": {name: b._asdict() for name, b in bounds.items()},
        "quality": quality,
        "classifier_accuracy": accuracy,
        "classifier_score_of_real_digits": real_score,
        "agreement": {name: asdict(a) for name, a in agreement.items()},
        "cost": {name: c.as_dict() for name, c in cost.items()},
        "curves": {name: asdict(c) for name, c in (bound_curves | adversarial_curves).items()},
        "weights": weights.tolist(),
    }  # fmt: skip
    results["seconds"] = time.perf_counter() - began
    (output / "results.json").write_text(json.dumps(results, indent=1))
    print(report(results))
    print(f"\n{results['seconds']:.0f} s in all. Pictures and results.json: {output}")
    return results


def report(results: dict[str, Any]) -> str:
    """The tables, from results.json's content."""
    settings, bounds, quality = results["settings"], results["bounds"], results["quality"]
    lines = [
        "",
        f"Held-out bounds on log p(x), nats per digit, mean of {settings['test_digits']} digits (higher is better)",
        f"{'':<7}{'ELBO':>9}{'K = 16':>9}{'K = 500':>9}   effective samples of 16, of 500 weights",
    ]
    for name, b in bounds.items():
        lines.append(
            f"{name:<7}{b['elbo']:>9.2f}{b['iwae']:>9.2f}{b['log_likelihood']:>9.2f}"
            f"   {b['ess_16']:.1f}, {b['ess_500']:.1f}"
        )
    lines += [
        "",
        f"Generated digits: inception-style score, 1 to 10, of a digit classifier that is right on "
        f"{results['classifier_accuracy']:.1%} of the held-out digits",
        f"{'':<7}{'score':>9}{'D(G(z))':>9}   effective samples of a batch of {settings['batch_size']}",
    ]
    for name, q in quality.items():
        unused = "   (its weights are not used)" if name == "GAN" else ""
        lines.append(
            f"{name:<7}{q['classifier_score']:>9.2f}{q['mean_discriminator']:>9.3f}   {q['ess_of_batch']:.1f}{unused}"
        )
    lines.append(f"{'real':<7}{results['classifier_score_of_real_digits']:>9.2f}   (the held-out digits)")
    gan, iwgan = (quality[name]["classifier_score"] for name in ("GAN", "IWGAN"))
    verdict = "higher" if iwgan > gan else "not higher"
    lines += [
        f"IWGAN's score is {verdict} than GAN's ({iwgan - gan:+.2f}): one run each; scores move from seed to seed.",
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
    lines.append("No step can gain more than the share its losses had; a few percent of a step are the clock's noise.")
    return "\n".join(lines)
