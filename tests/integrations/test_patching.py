"""How ours get to where theirs were, and away again; on a library made up here, so that every run has it."""

import functools
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import unigen_fast as uf
from unigen_fast.integrations import _patching

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

    library = _patching.Library("made_up", "torch", "1.0")  # a distribution that is installed

    @library.replaces("made_up", "penalty", code=_patching.fingerprint(made_up.penalty), corrects="three times as much")
    def penalty(x: Tensor, weight: float = 2.0, *, correct: bool = False) -> Any:
        return NotImplemented if x.dim() == 0 else (3 if correct else 1) * weight * (x * x).sum()

    @library.replaces("made_up", "Model.loss", code=_patching.fingerprint(made_up.Model.loss))
    def loss(self: Any, x: Tensor) -> Tensor:
        return x.abs().sum()

    yield made_up
    if "made_up" in _patching.Patch.active:
        _patching.Patch.active["made_up"].unpatch()
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


def test_another_version_is_refused_before_anything_is_patched(made_up: ModuleType) -> None:
    theirs, loss = made_up.penalty, made_up.Model.loss
    exec(compile("def loss(self, x):\n    return x.abs().mean()\n", "<none>", "exec"), scope := {})
    made_up.Model.loss = scope["loss"]
    with pytest.raises(RuntimeError, match=r"made_up .*: made_up\.Model\.loss is not the function of torch 1\.0"):
        apply()
    assert made_up.penalty is theirs and not uf.integrations.is_patched("made_up")
    apply(check_version=False).unpatch()
    del made_up.Model.loss
    for check_version in (True, False):
        with pytest.raises(RuntimeError, match=r"has no made_up\.Model\.loss, which torch 1\.0 has"):
            apply(check_version=check_version)
    assert made_up.penalty is theirs
    made_up.Model.loss = loss


def test_layout_comments_and_docstrings_are_not_code(made_up: ModuleType, tmp_path: Any) -> None:
    same = "def penalty(x,\n    weight = 2.0):\n    # squares\n    return (weight * (x*x).sum())\n"
    for name, source in (("same", same), ("other", same.replace("x*x", "x**3"))):
        (tmp_path / f"{name}.py").write_text(source)
    import other  # type: ignore[import-not-found]
    import same as again  # type: ignore[import-not-found]

    assert _patching.fingerprint(again.penalty) == _patching.fingerprint(made_up.penalty)
    assert _patching.fingerprint(other.penalty) != _patching.fingerprint(made_up.penalty)
    assert _patching.fingerprint(functools.partial(print)) == ""  # type: ignore[arg-type]
    del sys.modules["same"], sys.modules["other"]


def test_missing_and_unknown_libraries() -> None:
    _patching.Library("not_there", "not-there-at-all", "1.0")
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
