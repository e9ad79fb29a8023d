"""The scripts of examples/paper run and write what they say; the statistics are right; no figure is typed by hand."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import numbers

import unigen_fast as uf

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

PAPER = Path(__file__).parent.parent / "examples" / "paper"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Importable as they are to each other; the threads as they were, as the scripts take one."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPER))
        yield
    torch.set_num_threads(threads)


def script(name: str) -> ModuleType:
    return __import__(name)


@pytest.fixture(scope="module")
def output(scripts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all the scripts write at their smallest."""
    directory = tmp_path_factory.mktemp("paper")
    for name in ("gan", "vae", "memorization", "tried"):
        script(name).main(["--size", "tiny", "--seeds", "2", "--workers", "1", "--output", str(directory)])
    return directory


@pytest.mark.parametrize("name", ["gan", "vae", "memorization", "tried"])
def test_writes_finite_figures(output, name):
    record = json.loads((output / f"{name}.json").read_text())
    found = list(numbers(record))
    assert len(found) > 50 and all(map(math.isfinite, found))
    assert record["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["gan_samples", "gan_curves", "vae_curves", "memorization"])
def test_draws(output, name):
    assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_tables_of_any_run(output):
    """Every table can be made of what the scripts write."""
    report = script("report")
    text = "".join(f"<!-- paper:{name} -->\n<!-- /paper -->\n" for name in report.TABLES)
    once = report.filled(text, output)
    assert once.count("\n|") > 30
    assert report.filled(once, output) == once


def test_readme_has_the_figures_of_the_results():
    report = script("report")
    text = (PAPER / "README.md").read_text()
    assert report.filled(text, PAPER / "results") == text


def test_prose_of_readme_has_no_figures_of_ours():
    """What is not between markers has no number with a decimal point."""
    prose = script("report")._MARKERS.sub("", (PAPER / "README.md").read_text())
    assert not re.search(r"\d\.\d", prose)


@pytest.mark.parametrize("path", sorted((PAPER / "results").iterdir()), ids=lambda path: path.name)
def test_published_files_are_small(path):
    assert path.stat().st_size < 300_000


def test_paired_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3), and t_0.975 of two degrees of freedom is 4.302653."""
    found = script("common").paired([10.0, 20.0, 30.0], [11.0, 22.0, 33.0])
    assert (found.n, found.mean, found.sd, found.higher) == (3, 2.0, 1.0, 3)
    assert found.t == pytest.approx(2 * math.sqrt(3))
    half = 4.302653 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_paired_without_spread():
    found = script("common").paired([1.0], [0.5])
    assert (found.mean, found.sd, found.t, found.low, found.high, found.higher) == (-0.5, 0, 0, -0.5, -0.5, 0)


@pytest.mark.parametrize("extended", [("VAE", "AAVAE"), ("SemiSupervisedVAE", "AASemiSupervisedVAE")])
def test_a_pair_begins_alike_and_sees_the_same(extended):
    vae = script("vae")
    settings = vae.SIZES["tiny"]
    states, seen = [], []
    for name in extended:
        torch.manual_seed(3)
        states.append(vae.build(name, settings).state_dict())
        torch.manual_seed(hash(name) % 100)  # training draws other numbers in each of the pair
        batches = vae.training_batches(name, vae.data_of("10%", 3, "cpu"), settings, 3)
        seen.append([next(batches) for _ in range(3)])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    for a, b in zip(*seen, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_gans_of_a_pair_begin_alike():
    gan = script("gan")
    states = []
    for name in ("ConditionalGAN", "IWConditionalGAN"):
        torch.manual_seed(3)
        states.append(gan.build(name, gan.SIZES["tiny"]).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_splits_are_disjoint_and_stratified():
    vae = script("vae")
    data = vae.data_of("1%", 0, "cpu")
    assert data.labels.bincount().tolist() == [4] * 10
    assert data.validation_labels.bincount().tolist() == [40] * 10
    assert len(data.train) + len(data.unlabelled) == 3600
    assert torch.cdist(data.train, data.unlabelled).min() > 0
    other = vae.data_of("1%", 1, "cpu")
    assert not torch.equal(data.train, other.train) and torch.equal(data.validation, other.validation)


def test_same_seed_same_figures():
    vae = script("vae")
    task = vae.Task("AAVAE", "1%", 0)
    a, b = (vae.train(vae.SIZES["tiny"], "cpu", task) for _ in range(2))
    assert a["elbo"] == b["elbo"] and a["curve"] == b["curve"]


def test_the_best_step_is_what_is_tested():
    """Longer training with the best step early on: the figures are those of that step."""
    vae = script("vae")
    found = vae.train(vae.SIZES["tiny"], "cpu", vae.Task("VAE", "1%", 0))
    best = max(found["curve"]["validation"])
    assert found["validation"] == best
    assert found["curve"]["step"][found["curve"]["validation"].index(best)] == found["best_step"]


@pytest.mark.parametrize("pair", [0, 1, 2])
def test_the_papers_sizes_train(pair):
    """Two steps of either model at the sizes that are meant for a GPU."""
    vae = script("vae")
    settings = replace(
        vae.SIZES["paper"], steps={"10%": 2}, steps_semi_supervised=2, entries=1, test_draws=1, samples=1
    )
    for name in vae.PAIRS[pair]:
        found = vae.train(settings, "cpu", vae.Task(name, "10%", 0))
        assert math.isfinite(found["elbo"])


def test_the_papers_sizes_train_gans():
    gan = script("gan")
    settings = replace(gan.SIZES["paper"], steps=2, entries=1, generated=20, classifier_epochs=1)
    judge = gan.Judge.train(settings, "cpu")
    for name in ("IWGAN", "IWConditionalGAN"):
        assert gan.train(settings, "cpu", judge, gan.Task(name, 0))["score"] >= 1


@pytest.mark.parametrize("family", ["VAE", "SVAE"])
def test_constant_weights_are_the_mixture_of_data_and_samples(family):
    tried, vae = script("tried"), script("vae")
    (change,) = [c for c in tried.FAMILIES[family].changes if "1/2" in c.text]
    model = vae.build(tried.FAMILIES[family].models[1], vae.SIZES["tiny"], change.extended)
    assert isinstance(model, uf.models.AAVAE)
    assert (model.q_reversed(torch.rand(3, 784)) == 0.5).all()


def test_samples_that_keep_their_labels():
    """They count as labelled, with the labels of the labelled digits; all others as unlabelled."""
    tried, vae = script("tried"), script("vae")
    data, settings = vae.data_of("10%", 0, "cpu"), vae.SIZES["tiny"]
    x, labels, unlabelled = next(vae.training_batches("SemiSupervisedVAE", data, settings, 0))
    model = vae.build("AASemiSupervisedVAE", settings, tried.LabelsKept)
    seen, drawn, sample = [], [], model.sample
    model.semi_supervised = lambda *given: seen.append(given) or {"loss": torch.ones(())}
    model.sample = lambda n, labels=None: drawn.append(labels) or sample(n, labels)
    assert model.autoencoder_phase((x, labels, unlabelled))["loss"] == 1
    assert drawn[0] is labels and drawn[1] is None
    assert seen[0][0] is x and seen[0][2] is unlabelled and len(seen) == 2
    for given in seen:
        assert [len(t) for t in given] == [len(x), len(x), len(unlabelled), len(x), len(unlabelled)]
        assert given[1] is labels


def test_a_change_is_relative_to_the_size():
    """A factor of an integer gives one, and of any size what its text says."""
    tried, vae = script("tried"), script("vae")
    change = tried.Change("", {"grey": True}, {"discriminator_hidden": 1 / 20, "discriminator_learning_rate": 5})
    for size, hidden in (("tiny", 1), ("small", 10), ("paper", 25)):
        found = change.of(vae.SIZES[size])
        assert (found.discriminator_hidden, found.grey) == (hidden, True)
        assert found.discriminator_learning_rate == pytest.approx(5 * vae.SIZES[size].discriminator_learning_rate)


def test_changes_that_concern_no_base_share_it():
    """Of the VAEs without a discriminator only grey digits, and of the SVAEs fewer steps, make another base."""
    families = script("tried").FAMILIES.items()
    found = {name: [family.base_of(i) for i in range(len(family.changes))] for name, family in families}
    assert found == {"VAE": [0, 0, 0, 0, 0, 5], "SVAE": [0, 1, 0, 0], "GAN": [0, 1, 2]}
