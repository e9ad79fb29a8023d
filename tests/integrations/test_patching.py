"""How ours get to where theirs were, and away again; on a library made up here, so that every run has it."""

import functools
import importlib
import inspect
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import fingerprints
import pytest
import torch
from torch import Tensor

import unigen_fast as uf
from unigen_fast.integrations import _fingerprint, _patching, torch_distributions

SOURCE = '''
def penalty(x, weight=2.0):
    """Of x."""
    return weight * (x * x).sum()

class Model:
    def loss(self, x):
        return x.abs().sum()

class Heir(Model):
    pass

class Table:
    losses = {"penalty": penalty}
    method = staticmethod(penalty)
    attribute = penalty
'''
USER = "from made_up import *\nfrom made_up import penalty as imported\nlisted = [penalty, None]\n"


@pytest.fixture
def made_up(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A library, another module that imported everything from it, and ours for two of its functions."""
    (tmp_path / "made_up.py").write_text(SOURCE)
    (tmp_path / "user_of_it.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    import made_up  # type: ignore[import-not-found]

    library = _patching.Library("made_up", "torch")  # a distribution that is installed

    accepted = {_fingerprint.of_function(made_up.penalty): "1.0", "another": "0.8 to 0.9"}

    @library.replaces("made_up", "penalty", accepted=accepted, corrects="three times as much")
    def penalty(x: Tensor, weight: float = 2.0, *, correct: bool = False) -> Any:
        return NotImplemented if x.dim() == 0 else (3 if correct else 1) * weight * (x * x).sum()

    @library.replaces("made_up", "Model.loss", accepted={_fingerprint.of_function(made_up.Model.loss): "1.0"})
    def loss(self: Any, x: Tensor) -> Tensor:
        return x.abs().sum()

    yield made_up
    uf.integrations.unpatch("made_up")
    del _patching.Library.every["made_up"], sys.modules["made_up"]
    sys.modules.pop("user_of_it", None)


X = torch.tensor([1.0, -2.0])


def apply(**options: Any) -> _patching.Patch:
    return _patching.apply("made_up", **{"check_version": True, "correct": False, **options})


def test_every_name_is_found_and_given_back(made_up: ModuleType) -> None:
    import user_of_it  # type: ignore[import-not-found]

    class Trainer:
        def __init__(self) -> None:
            self.loss = made_up.penalty

    trainer = Trainer()
    names: dict[str, Any] = {
        "module": lambda: made_up.penalty,
        "star import": lambda: user_of_it.penalty,
        "import under another name": lambda: user_of_it.imported,
        "list": lambda: user_of_it.listed[0],
        "table of a class": lambda: made_up.Table.losses["penalty"],
        "attribute of a class": lambda: made_up.Table.attribute,
        "attribute of an object": lambda: trainer.loss,
    }
    before = tuple(get() for get in names.values())
    assert len(set(before)) == 1
    with apply() as patch:
        for name, get in names.items():
            assert get() is not before[0], name
            get()(X)
        assert patch.calls()["made_up.penalty"] == len(names)
        # imported while it is patched
        scope: dict[str, Any] = {}
        exec("from made_up import penalty", scope)
        late = scope
        assert late["penalty"] is made_up.penalty
    assert tuple(get() for get in names.values()) == before
    assert late["penalty"] is before[0]


def test_methods_and_heirs(made_up: ModuleType) -> None:
    model, heir = made_up.Model(), made_up.Heir()
    with apply():
        assert model.loss(X) == heir.loss(X) == 3
        assert uf.integrations.calls("made_up")["made_up.Model.loss"] == 2
    assert "loss" not in vars(made_up.Heir)
    kept = {"loss": model.loss}  # bound before, as pyro's SVI keeps its loss
    with apply() as patch:
        assert kept["loss"](X) == 3
        assert patch.calls()["made_up.Model.loss"] == 1
    assert kept["loss"] == model.loss
    with apply():
        assert model.loss(X) == heir.loss(X) == 3
    model.loss(X)
    assert uf.integrations.calls("made_up") == {"made_up.penalty": 0, "made_up.Model.loss": 2}  # to be read afterwards


def test_what_is_not_for_ours_goes_to_theirs_and_does_not_count(made_up: ModuleType) -> None:
    with apply():
        assert made_up.penalty(torch.tensor(2.0), weight=0.5) == 2
        assert uf.integrations.calls("made_up")["made_up.penalty"] == 0


def test_applying_twice_and_with_other_options(made_up: ModuleType) -> None:
    theirs = made_up.penalty
    patch = apply()
    assert apply() is patch and patch.is_patched()
    assert made_up.penalty(X) == 10
    other = apply(correct=True)
    assert not patch.is_patched() and other.is_patched()
    assert made_up.penalty(X) == 30
    patch.unpatch()  # it is no longer there: nothing happens
    assert made_up.penalty(X) == 30
    uf.integrations.unpatch()
    assert made_up.penalty is theirs and not uf.integrations.is_patched("made_up")
    other.unpatch()
    assert made_up.penalty is theirs


def test_patched_leaves_what_was_there_before(made_up: ModuleType) -> None:
    theirs = made_up.penalty
    with uf.integrations.patched("made_up"):
        with uf.integrations.patched("made_up", correct=True):
            assert made_up.penalty(X) == 30
        assert made_up.penalty(X) == 10
        with uf.integrations.patched("made_up"):
            pass
        assert uf.integrations.is_patched("made_up")
    assert made_up.penalty is theirs
    with pytest.raises(KeyError), uf.integrations.patched("made_up"):
        raise KeyError
    assert made_up.penalty is theirs


def test_ours_looks_like_theirs(made_up: ModuleType) -> None:
    theirs = made_up.penalty
    with apply():
        ours = made_up.penalty
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert (ours.__name__, ours.__doc__, ours.__module__) == ("penalty", "Of x.", "made_up")
        assert inspect.unwrap(ours) is theirs


def test_what_matches_is_patched_and_the_rest_is_named(made_up: ModuleType) -> None:
    penalty, loss = made_up.penalty, made_up.Model.loss
    exec(compile("def loss(self, x):\n    return x.abs().mean()\n", "<none>", "exec"), scope := {})
    made_up.Model.loss = other = scope["loss"]
    reason = r"made_up\.Model\.loss is not the function of torch 1\.0, with which ours was compared"
    with pytest.warns(UserWarning, match=f"^made_up: not patched: {reason}") as caught, apply() as patch:
        assert list(patch.skipped) == ["made_up.Model.loss"]
        assert made_up.penalty is not penalty and made_up.Model.loss is other
        assert apply() is patch  # without another warning
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=reason) as caught, uf.integrations.patched("made_up"):
        pass
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning), uf.integrations.patched("made_up"):
            pass
        assert made_up.penalty is penalty and not uf.integrations.is_patched("made_up")
        with apply(check_version=False) as patch:
            assert not patch.skipped and made_up.Model.loss is not other
    del made_up.Model.loss
    with pytest.warns(UserWarning, match=r"made_up\.Model\.loss is not there; torch 1\.0 has it"):
        apply(check_version=False).unpatch()
    made_up.Model.loss = loss
    assert made_up.penalty is penalty


def test_nothing_to_patch_is_an_error(made_up: ModuleType) -> None:
    exec(compile("def penalty(x):\n    return x\n", "<none>", "exec"), scope := {})
    before = apply(check_version=False)
    ours = made_up.penalty
    before.unpatch()
    made_up.penalty, penalty = scope["penalty"], made_up.penalty
    del made_up.Model
    with pytest.raises(
        RuntimeError, match=r"made_up .*: nothing was patched; made_up\.penalty is not the function of"
    ) as e:
        apply()
    assert "torch 1.0, 0.8 to 0.9" in str(e.value) and "made_up.Model.loss is not there" in str(e.value)
    assert made_up.penalty is scope["penalty"] and not uf.integrations.is_patched("made_up")
    assert ours(X) == penalty(X)


CODE = """
def penalty(x, weight=2.0):
    if weight < 0:
        raise ValueError(f"got {weight:{'>'}{8}}" "expected" f" 0")
    with torch.no_grad():
        scale: float = -weight
    return {**{"loss": scale * x[..., 1:]}}["loss"] if (y := x.sum()) else lambda *, z=u"": z
"""


@pytest.mark.parametrize(
    "same",
    [
        CODE,
        CODE.replace("x, weight=2.0", "x: 'Tensor', weight: float = 2.0").replace("):\n    if", ") -> Any:\n    if"),
        CODE.replace("    if weight", '    """Of x."""\n    # squares\n    scale: int\n    if weight'),
        CODE.replace('(f"got', '(\n        f"got').replace("scale: float =", "scale =").replace('u""', "''"),
        "if torch:" + CODE.replace("\n", "\n    "),
        "try:" + CODE.replace("\n", "\n    ") + "\nfinally:\n    pass",
    ],
)
def test_a_fingerprint_is_of_what_is_computed(same: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of a file and of the function in memory, and under every Python."""
    assert _fingerprint.of_source(same, "penalty") == ["f9d8e55c39832eee"]
    (tmp_path / "same.py").write_text(f"from typing import Any\nimport torch\n{same}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        assert _fingerprint.of_function(importlib.import_module("same").penalty) == "f9d8e55c39832eee"
    finally:
        sys.modules.pop("same", None)


@pytest.mark.parametrize("old, new", [("2.0", "2"), ("-weight", "+weight"), ("8", "9"), ("1:", ":1"), ("x,", "y,")])
def test_a_fingerprint_of_other_code_is_another(old: str, new: str) -> None:
    assert CODE.replace(old, new) != CODE
    assert _fingerprint.of_source(CODE.replace(old, new), "penalty") != _fingerprint.of_source(CODE, "penalty")


def test_fingerprints_of_several_definitions_and_of_none() -> None:
    source = "class A:\n    if x:\n        def f(self): return 1\n    else:\n        def f(self): return 2\n"
    assert len(_fingerprint.of_source(source, "A.f")) == 2
    assert _fingerprint.of_source(source, "f") == _fingerprint.of_source(source, "A.g") == []
    assert _fingerprint.of_function(functools.partial(print)) == _fingerprint.of_function(len) == ""


def test_the_page_has_the_accepted_releases(tmp_path: Any) -> None:
    text = (fingerprints.ROOT / "docs" / "integrations.md").read_text()
    page = tmp_path / "integrations.md"
    page.write_text(text.replace("| taming-transformers |", "| another |"))
    fingerprints.put_table(page)
    assert "| taming-transformers |" in text and page.read_text() == text


def test_a_release_that_has_drifted_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Of two releases of a made-up package: the newest lacks one of the functions and has changed the other."""
    replacements = [
        _patching.Replacement(
            "p", "p.a", name, len, dict.fromkeys(_fingerprint.of_source(f"def {name}(): pass", name)), ""
        )
        for name in ("f", "g")
    ]
    for version, source in (("2.0", "def f(x): pass"), ("1.0", "def f(): pass\ndef g(): pass")):
        with zipfile.ZipFile(tmp_path / f"p-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("p/a.py", source)

    def releases(distribution: str, count: int) -> Iterator[Any]:
        yield from sorted(tmp_path.iterdir(), reverse=True)[:count]
        raise fingerprints.Unavailable("p<1.0: no route")

    monkeypatch.setattr(fingerprints, "releases", releases)
    lines, drifted, skipped = fingerprints.check("p", replacements, 2)
    code = _fingerprint.of_source("def f(x): pass", "f")[0]
    assert lines[:3] == ["p 2.0: 0/2", f"  p.a.f has another code, {code}", "  p.a.g is not there"]
    assert lines[3:] == ["p 1.0: 2/2", "p: SKIPPED, cannot be fetched: p<1.0: no route"]
    assert drifted and skipped


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct", [False, True])
def test_a_block_in_another_thread_keeps_the_patch(made_up: ModuleType, correct: bool) -> None:
    theirs = made_up.penalty
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with uf.integrations.patched("made_up", correct=correct):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with uf.integrations.patched("made_up"):
        thread.start()
        assert entered.wait(10)
        assert made_up.penalty(X) == (30 if correct else 10)  # the block entered last decides
    assert made_up.penalty(X) == (30 if correct else 10) and uf.integrations.is_patched("made_up")
    leave.set()
    thread.join()
    assert made_up.penalty is theirs and not uf.integrations.is_patched("made_up")


def test_apply_in_a_block_outlives_it_and_unpatch_ends_all(made_up: ModuleType) -> None:
    theirs = made_up.penalty
    with uf.integrations.patched("made_up"):
        apply(correct=True)
    assert made_up.penalty(X) == 30
    with uf.integrations.patched("made_up"), uf.integrations.patched("made_up", correct=True):
        uf.integrations.unpatch("made_up")
        assert made_up.penalty is theirs
    assert made_up.penalty is theirs
    with apply() as patch, patch:
        assert made_up.penalty(X) == 10
    assert made_up.penalty is theirs
    with patch:  # a block of a patch that was taken away: in place again
        assert made_up.penalty is not theirs
    assert made_up.penalty is theirs


def test_what_is_kept_from_a_block_is_theirs_afterwards(made_up: ModuleType) -> None:
    with apply() as patch:
        kept = functools.partial(made_up.penalty), (made_up.penalty,)
        assert kept[0](X) == kept[1][0](X) == 10
        assert patch.calls()["made_up.penalty"] == 2
    assert kept[0](X) == kept[1][0](X) == 10
    assert patch.calls()["made_up.penalty"] == 2


def test_threads_leave_nothing_behind(made_up: ModuleType, seconds: float = 1.0) -> None:
    from torch import distributions
    from torch.distributions import kl

    p, q = (distributions.Independent(distributions.Normal(torch.full((3,), m), 1.0), 1) for m in (0.0, 2.0))
    theirs = {name: getattr(kl, name) for name in ("_kl_normal_normal", "_kl_independent_independent", "register_kl")}
    registry, penalty, loss = dict(kl._KL_REGISTRY), made_up.penalty, made_up.Model.loss
    end, rounds, errors = time.monotonic() + seconds, [0] * 4, []

    def work(i: int) -> None:
        try:
            while rounds[i] < 2 or time.monotonic() < end:
                correct = (i + rounds[i]) % 2 == 1
                libraries = ("made_up", "torch_distributions")[:: 1 if i % 2 else -1]
                with uf.integrations.patched(*libraries, correct=correct):
                    assert uf.integrations.is_patched("made_up")
                    assert made_up.penalty(X) in (10, 30) and made_up.Model().loss(X) == 3
                    assert distributions.kl_divergence(p, q) == 6
                    kl._KL_MEMOIZE.clear()
                rounds[i] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not _patching.Patch.active and not any(_patching.Patch.wanted.values())
    assert made_up.penalty is penalty and made_up.Model.loss is loss
    assert {name: getattr(kl, name) for name in theirs} == theirs and dict(kl._KL_REGISTRY) == registry
    before = uf.integrations.calls()
    assert distributions.kl_divergence(p, q) == 6 and made_up.penalty(X) == 10
    assert uf.integrations.calls() == before


# ---- entries of kl_divergence ----------------------------------------------------------------------------------------

ENTRY = """
from torch.distributions import Independent, kl_divergence, register_kl

@register_kl(Independent, Independent)
def _kl_independent_independent(p, q):
    return kl_divergence(p.base_dist, q.base_dist).sum(-1)
"""


@pytest.fixture
def late_entry(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that, as pyro does, registers an entry of its own when it is imported."""
    from torch.distributions import kl

    (tmp_path / "late_entry.py").write_text(ENTRY)
    monkeypatch.syspath_prepend(tmp_path)
    registry = dict(kl._KL_REGISTRY)
    library = torch_distributions._DISTRIBUTIONS
    before = list(library.replacements)
    library.replaces(
        "late_entry",
        "_kl_independent_independent",
        accepted={_fingerprint.of_source(ENTRY, "_kl_independent_independent")[0]: "1.0"},
        distribution="late-entry",
    )(torch_distributions._kl_independent_independent)
    yield
    uf.integrations.unpatch()
    library.replacements[:] = before
    sys.modules.pop("late_entry", None)
    _patching._CALLS.pop("late_entry._kl_independent_independent", None)  # counts outlive the patch
    kl._KL_REGISTRY.update(registry)
    kl._KL_MEMOIZE.clear()


def normals() -> list[Any]:
    family = torch.distributions
    return [family.Independent(family.Normal(torch.full((3,), mean), 1.0), 1) for mean in (0.0, 2.0)]


@pytest.mark.parametrize("when", ["before", "while", "again"])
def test_an_entry_registered_by_another_library(when: str, late_entry: None) -> None:
    from torch.distributions import kl, kl_divergence

    path = "late_entry._kl_independent_independent"
    if when == "before":
        importlib.import_module("late_entry")
    with uf.integrations.patched("torch_distributions"):
        if when == "again":
            assert kl_divergence(*normals()) == 6
        late = importlib.import_module("late_entry")
        for _ in range(2):
            assert kl_divergence(*normals()) == 6
        assert uf.integrations.calls("torch_distributions")[path] == 2
    theirs = late._kl_independent_independent
    assert kl._KL_REGISTRY[(torch.distributions.Independent,) * 2] is theirs and not hasattr(theirs, "__wrapped__")
    assert kl_divergence(*normals()) == 6
    assert uf.integrations.calls("torch_distributions")[path] == 2


def test_a_late_entry_of_other_code_is_left_and_named(late_entry: None, tmp_path: Any) -> None:
    (tmp_path / "late_entry.py").write_text(ENTRY.replace(".sum(-1)", ".sum(-1) + 1"))
    patch = uf.integrations.apply_to_torch_distributions()
    with pytest.warns(UserWarning, match=r"not patched: late_entry\._kl_independent_independent is not the function"):
        importlib.import_module("late_entry")
    assert list(patch.skipped) == ["late_entry._kl_independent_independent"]
    assert torch.distributions.kl_divergence(*normals()) == 7


def test_an_entry_for_a_subclass_of_normal_is_called_for_independent_ones() -> None:
    from torch.distributions import Independent, Normal, kl, kl_divergence

    class Own(Normal):
        pass

    def independent() -> Any:
        return kl_divergence(*[Independent(Own(torch.full((3,), mean), 1.0), 1) for mean in (0.0, 2.0)])

    with uf.integrations.patched("torch_distributions"):
        assert independent() == 6
        assert sum(uf.integrations.calls("torch_distributions").values()) == 1
        kl.register_kl(Own, Own)(lambda p, q: p.loc * 0 + 5)
        try:
            assert independent() == 15
        finally:
            del kl._KL_REGISTRY[Own, Own]
            kl._KL_MEMOIZE.clear()


def test_missing_and_unknown_libraries() -> None:
    _patching.Library("not_there", "not-there-at-all")
    try:
        with pytest.raises(ImportError, match="not_there: not installed"):
            _patching.apply("not_there", check_version=True, correct=False)
    finally:
        del _patching.Library.every["not_there"]
    for call in (uf.integrations.unpatch, uf.integrations.is_patched, uf.integrations.calls):
        with pytest.raises(ValueError, match="got 'tensorflow', expected one of 'diffusers'"):
            call("tensorflow")
    with pytest.raises(ValueError, match="got 'tensorflow'"), uf.integrations.patched("tensorflow"):
        pass
    with pytest.raises(ValueError, match=r"apply_to_vits\(module\)"), uf.integrations.patched("vits"):
        pass


def test_a_compiled_call_counts_once_for_its_graph(made_up: ModuleType, fresh_dynamo: None) -> None:
    with apply() as patch:
        step = torch.compile(lambda x: made_up.penalty(x) + 1, backend="eager", fullgraph=True)
        for _ in range(3):
            assert step(X) == 11
        assert patch.calls()["made_up.penalty"] == 1
