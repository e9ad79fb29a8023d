"""The demo runs, writes what it says; its figures make sense: bounds are ordered on one model. No time is judged."""

import json
import math

import pytest
import torch

import unigen_fast as uf
from unigen_fast import demo

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

PICTURES = ("samples", "reconstructions", "bounds", "adversaries", "weights", "costs")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, object]:
    output = tmp_path_factory.mktemp("demo") / "pictures"
    arguments = ["--steps-scale", "0.01", "--test-digits", "100", "--quiet", "--output", str(output)]
    assert demo.main(arguments) == 0
    return json.loads((output / "results.json").read_text()), output


def numbers(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from numbers(branch)
    elif isinstance(tree, int | float):
        yield tree


def test_writes_pictures_and_finite_figures(run):
    results, output = run
    for name in PICTURES:
        content = (output / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG"), name
        assert len(content) < 600_000, name  # untrained generators give noise, which compresses badly
    assert all(math.isfinite(x) for x in numbers(results))


def test_more_samples_tighten_the_bound(run):
    results, _ = run
    for name, b in results["bounds"].items():
        assert -600 < b["elbo"] < b["iwae"] < b["log_likelihood"] + 0.1, name  # 0.1 nats: Monte Carlo
        assert b["log_likelihood"] < -100, name  # nobody explains binary digits better in 20 steps
        assert 1 <= b["ess_16"] <= 16 and 1 <= b["ess_500"] <= 500, name


def test_learns_from_the_first_steps(run):
    results, _ = run
    for name in ("VAE", "IWAE"):
        curve = results["curves"][name]
        assert curve["elbo"][-1] > curve["elbo"][0] + 50, name
        assert all(b > e for b, e in zip(curve["iwae"], curve["elbo"], strict=True)), name


def test_adversarial_figures(run):
    results, _ = run
    weights = results["weights"]
    assert sum(weights) == pytest.approx(1, abs=1e-5) and min(weights) >= 0
    for q in results["quality"].values():
        assert 1 <= q["classifier_score"] <= 10
        assert 0 < q["mean_discriminator"] < 1
        assert 1 <= q["ess_of_batch"] <= results["settings"]["batch_size"]
    assert results["classifier_accuracy"] > 0.85
    assert 5 < results["classifier_score_of_real_digits"] <= 10


def test_agrees_with_plain_pytorch(run):
    results, _ = run
    for name, difference in results["agreement"].items():
        assert difference["loss"] < 1e-5, name
        assert difference["gradient"] < 1e-4, name


def test_agreement_sees_a_wrong_loss(monkeypatch):
    from unigen_fast.demo import costs, networks, train

    monkeypatch.setitem(costs.STEPS, "GAN", (train.iwgan_step, costs.STEPS["GAN"][1]))
    found = costs.agreement("GAN", networks.Adversaries(), torch.rand(8, 784), seed=0)
    assert found.loss > 1e-3 and found.gradient > 1e-3


def test_replayed_step_gives_the_losses_of_the_real_one():
    """What is timed as "the losses" is the step's own arithmetic."""
    from unigen_fast.demo import costs, networks, train

    model, x = networks.Adversaries().eval(), torch.rand(8, 784)
    replay = costs._ReplayAdversaries(model, x)
    losses = train.gan_step(replay, train.AdversarialOptimizers(replay, replay), x)
    with torch.no_grad():
        real, fake = model.discriminator(x), model.discriminator(replay.fake)
    torch.testing.assert_close(losses.discriminator, uf.discriminator_loss(real=real, fake=fake))
    torch.testing.assert_close(losses.generator, uf.generator_loss(fake=fake))


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


def test_same_seed_same_training():
    from unigen_fast.demo import networks, train

    def parameters() -> torch.Tensor:
        torch.manual_seed(1)
        model = networks.Adversaries()
        optimizers = train.AdversarialOptimizers.of(model)
        for _ in range(2):
            train.iwgan_step(model, optimizers, torch.rand(16, 784))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(parameters(), parameters())


@pytest.mark.parametrize("arguments", [["--steps-scale", "0"], ["--test-digits", "15"], ["--test-digits", "2000"]])
def test_refuses_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        demo.main(arguments)
    assert error.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo, "REQUIRED", ("a_package_that_nobody_has",))
    with pytest.raises(SystemExit, match=r"a_package_that_nobody_has: pip install unigen_fast\[demo\]"):
        demo.main([])
