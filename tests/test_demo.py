"""The demo runs, writes what it says; its figures make sense: bounds are ordered on one model. No time is judged."""

import json
import math

import pytest
import torch
from helpers import numbers

import unigen_fast as uf
from unigen_fast import demo

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

PICTURES = ("samples", "reconstructions", "bounds", "adversaries", "weights", "costs")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, object]:
    output = tmp_path_factory.mktemp("demo") / "pictures"
    arguments = ["--steps-scale", "0.01", "--test-digits", "40", "--quiet", "--output", str(output)]
    assert demo.main(arguments) == 0
    return json.loads((output / "results.json").read_text()), output


def test_writes_pictures_and_finite_figures(run):
    results, output = run
    for name in PICTURES:
        content = (output / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG"), name
        assert len(content) < 600_000, name  # untrained generators give noise, which compresses badly
    assert all(math.isfinite(x) for x in numbers(results))


def test_more_samples_tighten_the_bound(run):
    results, _ = run
    assert set(results["bounds"]) == {"VAE", "AAVAE"}
    for name, b in results["bounds"].items():
        assert -600 < b["elbo"] < b["iwae"] < b["log_likelihood"] + 1, name  # 1 nat: Monte Carlo
        assert b["log_likelihood"] < -100, name  # nobody explains binary digits better in 15 steps


def test_learns_from_the_first_steps(run):
    results, _ = run
    for name in ("VAE", "AAVAE"):
        curve = results["curves"][name]
        assert curve["elbo"][-1] > curve["elbo"][0] + 50, name
        assert all(b > e - 1 for b, e in zip(curve["iwae"], curve["elbo"], strict=True)), name
    lengths = {len(values) for curve in results["curves"].values() for values in curve.values()}
    assert lengths == {results["settings"]["steps"]}


def test_says_what_each_phase_minimises(run):
    results, _ = run
    found = {name: [p["phase"] for p in phases] for name, phases in results["phases"].items()}
    adversarial = ["discriminator", "generator"]
    expected = {"GAN": adversarial, "IWGAN": adversarial, "VAE": ["autoencoder"]}
    assert found == {**expected, "AAVAE": ["discriminator", "autoencoder"]}
    assert results["phases"]["VAE"][0]["minimises"] == uf.models.VAE.phases["autoencoder"].minimises


def test_adversarial_figures(run):
    results, _ = run
    weights = results["weights"]["IWGAN"]
    assert sum(weights) == pytest.approx(1, abs=1e-5) and min(weights) >= 0
    for values in results["weights"]["AAVAE"].values():
        assert 0 <= min(values) and max(values) <= 1
    for name, q in results["quality"].items():
        assert 1 <= q["classifier_score"] <= 10
        if name != "VAE":
            assert 0 < q["fake_probability"] < 1 and 0 <= q["real_accuracy"] <= 1
    for name in ("GAN", "IWGAN"):
        assert 1 <= results["quality"][name]["ess_of_batch"] <= results["settings"]["batch_size"]
    assert results["classifier_accuracy"] > 0.85
    assert 5 < results["classifier_score_of_real_digits"] <= 10


def test_agrees_with_plain_pytorch(run):
    results, _ = run
    for name, difference in results["agreement"].items():
        assert difference["loss"] < 1e-5, name
        assert difference["gradient"] < 1e-4, name


def test_extra_cost_is_that_of_its_model(run):
    results, _ = run
    for name, over in (("IWGAN", "GAN"), ("AAVAE", "VAE")):
        extra, cost = results["extra_cost"][name], results["cost"]
        assert (extra["over"], extra["over_step_ms"]) == (over, cost[over]["step_ms"])
        assert extra["ratio"] == pytest.approx(cost[name]["step_ms"] / cost[over]["step_ms"])
        assert extra["weighting_share"] == pytest.approx(extra["parts_ms"]["weighting"] / cost[name]["step_ms"])


@pytest.mark.parametrize(("name", "wrong"), [("GAN", "IWGAN"), ("IWGAN", "GAN")])
def test_agreement_sees_a_wrong_loss(monkeypatch, name, wrong):
    from unigen_fast.demo import costs, networks, plain

    monkeypatch.setattr(plain, name, getattr(plain, wrong))
    made = networks.networks()
    with torch.no_grad():
        made.discriminator[1].weight.mul_(30)  # logits that differ from sample to sample, and so do the weights
    found = costs.agreement(name, made, torch.rand(8, 784), seed=0)
    assert found.loss > 1e-3 and found.gradient > 1e-3


def test_agreement_sees_wrong_weights(monkeypatch):
    from unigen_fast.demo import costs, networks, plain

    monkeypatch.setattr(plain.AAVAE, "q_reversed", lambda self, x: 1 - self.discriminator(x).detach().sigmoid())
    found = costs.agreement("AAVAE", networks.networks(), torch.rand(8, 784).round(), seed=0)
    assert found.loss > 1e-3 and found.gradient > 1e-3


@pytest.mark.parametrize("name", ["GAN", "IWGAN", "VAE", "AAVAE"])
def test_replayed_step_gives_the_losses_of_the_real_one(name):
    """What is timed as "the losses" is the step's own arithmetic."""
    from unigen_fast.demo import costs, networks, train

    model, x = train.MODELS[name](networks.networks(), uf.models), torch.rand(8, 784).round()
    idle = dict.fromkeys(model.phases, costs._Idle())
    torch.manual_seed(0)
    replay = costs.replayed_step(model, x)
    for _ in range(2):
        torch.manual_seed(0)
        expected = train.step(model, idle, x)
        torch.manual_seed(0)
        torch.testing.assert_close(replay(), expected)


def test_models_start_from_the_same_parameters():
    from unigen_fast.demo import networks

    torch.manual_seed(0)
    first = networks.networks()
    torch.manual_seed(0)
    for network, again in zip(first, networks.networks(), strict=True):
        torch.testing.assert_close(network.state_dict(), again.state_dict())
    torch.testing.assert_close(first.discriminator[0].state_dict(), first.encoder[0].state_dict())


def test_digits_are_split_by_class_and_disjoint():
    from unigen_fast.demo.data import load_digits

    digits = load_digits(test_per_class=20)
    assert digits.train.shape == (4000, 784) and digits.test.shape == (200, 784)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [20] * 10
    assert 0 <= digits.train.min() and digits.train.max() == 1
    assert set(digits.test_binary.unique().tolist()) == {0.0, 1.0}
    assert torch.cdist(digits.test, digits.train).min() > 0
    torch.testing.assert_close(digits.test_binary, load_digits(test_per_class=20).test_binary)


@pytest.mark.parametrize("name", ["IWGAN", "AAVAE"])
def test_same_seed_same_training(name):
    from unigen_fast.demo import networks, train

    def parameters() -> torch.Tensor:
        torch.manual_seed(1)
        model = train.MODELS[name](networks.networks(), uf.models)
        optimizers = train.optimizers_of(model)
        for _ in range(2):
            train.step(model, optimizers, torch.rand(16, 784).round())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(parameters(), parameters())
