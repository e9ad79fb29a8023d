"""Our losses under another library's names, and away again.

A module of this package lists the functions that it stands in for (`Library.replaces`); a `Patch` puts them in place.
"""

import collections
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from unigen_fast.integrations import _fingerprint

_CALLS: collections.Counter[str] = collections.Counter()
_COUNTING = threading.Lock()
_PATCHING = threading.RLock()  # held by whoever changes what is in place, or looks at it to change it


class Replacement(NamedTuple):
    """One of the library's functions and ours for it."""

    distribution: str  # the library's, or that of another package which may have been imported or not
    module: str
    name: str  # as in the module: "VAE.loss_function"
    ours: Callable[..., Any]  # takes the same arguments; NotImplemented: theirs is to run
    accepted: Mapping[
        str, str
    ]  # fingerprints of the functions that ours was compared with: the releases that have each
    corrects: str  # what correct=True changes, if ours takes it

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


class Found(NamedTuple):
    """A function of the library that ours is to stand in for."""

    replacement: Replacement
    holder: Any  # its module or class
    name: str  # its name there
    theirs: FunctionType


class Library:
    """Another library and the functions that have one of ours."""

    every: ClassVar[dict[str, "Library"]] = {}

    def __init__(self, name: str, distribution: str) -> None:
        self.name = name
        self.distribution = distribution
        self.replacements: list[Replacement] = []
        Library.every[name] = self

    def replaces(
        self, module: str, name: str, *, accepted: Mapping[str, str], corrects: str = "", distribution: str = ""
    ) -> Callable[[Any], Any]:
        """Marks a function of ours: same arguments and, with `corrects`, a keyword `correct`."""

        def mark(ours: Callable[..., Any]) -> Callable[..., Any]:
            of = distribution or self.distribution
            self.replacements.append(Replacement(of, module, name, ours, accepted, corrects))
            return ours

        return mark

    def load(self) -> None:
        """Imports what there is to patch: before any lock is taken, since an import waits for other threads'."""
        try:
            importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"{self.name}: not installed (pip install {self.distribution})") from None
        for module in {r.module for r in self.replacements if r.distribution == self.distribution}:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):
                    raise
                # a release without it, which `found` says

    def found(self, check_version: bool) -> tuple[list[Found], dict[str, str]]:
        """The functions that ours can stand in for; why each of the others is left as it is."""
        version = importlib.metadata.version(self.distribution)
        found, skipped = [], {}
        for replacement in self.replacements:
            module = sys.modules.get(replacement.module)
            if module is None and replacement.distribution != self.distribution:
                continue  # a package that is not in use
            *classes, name = replacement.name.split(".")
            holder: Any = functools.reduce(lambda scope, part: getattr(scope, part, None), classes, module)
            theirs: Any = getattr(holder, "__dict__", {}).get(name)
            if reason := self.refusal(replacement, theirs, check_version):
                skipped[replacement.path] = reason
            else:
                found.append(Found(replacement, holder, name, theirs))
        if not found:
            raise RuntimeError(f"{self.name} {version}: nothing was patched; {_listed(skipped)}")
        return found, skipped

    def refusal(self, replacement: Replacement, theirs: Any, check_version: bool) -> str:
        """Why ours cannot stand in for this function; "" where it can."""
        releases = f"{replacement.distribution} {', '.join(replacement.accepted.values())}"
        if theirs is None:
            return f"is not there; {releases} has it"
        if check_version and _fingerprint.of_function(theirs) not in replacement.accepted:
            return f"is not the function of {releases}, with which ours was compared (check_version=False patches it)"
        return ""

    def exchanges(self, found: "list[Found]", patch: "Patch") -> "list[Exchange]":
        return [Exchange(each.holder, each.name, each.theirs, wrapped(each, patch)) for each in found]

    def forget(self) -> None:
        """Where the library keeps what it has looked up: another thread may have put a function there meanwhile."""

    def stand_in(self, theirs: FunctionType, patch: "Patch") -> FunctionType:
        """Ours, in place from now on, for a function that its module is about to have while the patch is in place."""
        with _PATCHING:
            names = (theirs.__module__, theirs.__qualname__)
            replacement = next((r for r in self.replacements if (r.module, r.name) == names), None)
            if replacement is None or not patch.is_patched():
                return theirs
            if reason := self.refusal(replacement, theirs, patch.options["check_version"]):
                patch.skipped[replacement.path] = reason
                say_skipped(self, {replacement.path: reason}, stacklevel=4)  # of whoever registers it
                return theirs
            found = Found(replacement, sys.modules[replacement.module], replacement.name, theirs)
            ours = wrapped(found, patch)
            patch.add(replacement, Exchange(found.holder, found.name, theirs, ours))
            return ours


def _listed(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"{path} {reason}" for path, reason in skipped.items())


class Patch:
    """The functions of a library that ours stand in for, until `unpatch()` or the end of a `with` block.

    Attributes:
        skipped: the functions that were left as they are, each with the reason.

    All threads share what is in place: of the `with` blocks that are open, the one entered last decides on the options,
    and the library has its own functions again at the end of them all.
    """

    active: ClassVar[dict[str, "Patch"]] = {}  # what is in place
    wanted: ClassVar[dict[str, "list[Patch]"]] = collections.defaultdict(list)  # the last of each is to be in place

    def __init__(self, library: Library, found: list[Found], skipped: dict[str, str], **options: bool) -> None:
        self.library = library.name
        self.skipped = skipped
        self.options = options
        self.paths = [each.replacement.path for each in found]  # whose calls are counted
        self.exchanges = library.exchanges(found, self)
        self._in_place = False
        self._kept = False  # until `unpatch`, and not only for the length of `with` blocks
        self._blocks = 0

    def is_patched(self) -> bool:
        return self._in_place

    def calls(self) -> dict[str, int]:
        """How often each of ours has run since it was put in place."""
        return calls(self.library)

    def unpatch(self) -> None:
        """Theirs again, wherever ours has got to, in `with` blocks still open too. A second time does nothing."""
        with _PATCHING:
            self._want(kept=False, blocks=0)

    def keep(self) -> None:
        """Until `unpatch`, in the place of what was to be kept before."""
        with _PATCHING:
            for other in [p for p in Patch.wanted[self.library] if p is not self]:
                other._want(kept=False, blocks=other._blocks)
            self._want(kept=True, blocks=self._blocks)

    def enter(self) -> None:
        with _PATCHING:
            self._want(kept=self._kept, blocks=self._blocks + 1)

    def leave(self, kept: bool) -> None:
        with _PATCHING:  # no block is left to end where it was unpatched meanwhile
            self._want(kept=self._kept and kept, blocks=max(self._blocks - 1, 0))

    def _want(self, *, kept: bool, blocks: int) -> None:
        self._kept, self._blocks = kept, blocks
        wanted = Patch.wanted[self.library]
        if (kept or blocks) and self not in wanted:
            wanted.append(self)
        elif not kept and not blocks and self in wanted:
            wanted.remove(self)
        settle(self.library)

    def put(self) -> None:
        Patch.active[self.library] = self
        self._in_place = True
        for path in self.paths:
            _CALLS[path] = 0
        substitute(self.exchanges)
        Library.every[self.library].forget()

    def add(self, replacement: Replacement, one: "Exchange") -> None:
        """One more, while it is in place."""
        self.exchanges.append(one)
        self.paths.append(replacement.path)
        _CALLS[replacement.path] = 0
        substitute([one])

    def take_away(self) -> None:
        exchange([each.back for each in self.exchanges])
        Library.every[self.library].forget()
        self._in_place = False
        del Patch.active[self.library]

    def __enter__(self) -> "Patch":
        self.enter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave(kept=False)

    def __repr__(self) -> str:
        state = "patched" if self.is_patched() else "not patched"
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"<{self.library}, {len(self.exchanges)} functions, {len(self.skipped)} skipped, {options}: {state}>"


def settle(library: str) -> None:
    """What is wanted last in place, and nothing else. Under `_PATCHING`, as all that follows."""
    active, wanted = Patch.active.get(library), Patch.wanted[library]
    last = wanted[-1] if wanted else None
    if active is not last:
        if active is not None:
            active.take_away()
        if last is not None:
            last.put()


def new_patch(library: Library, find: Callable[[], tuple[list[Found], dict[str, str]]], **options: bool) -> Patch:
    """Of what `find` finds where the library has its own functions; not yet in place."""
    if library.name in Patch.active:
        Patch.active[library.name].take_away()
    try:
        found, skipped = find()
        return Patch(library, found, skipped, **options)
    finally:
        settle(library.name)


def say_skipped(library: Library, skipped: Mapping[str, str], stacklevel: int) -> None:
    if skipped:
        warnings.warn(f"{library.name}: not patched: {_listed(skipped)}", stacklevel=stacklevel)


class Checkout(Library):
    """A repository that is no package: the user hands over its module of losses."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "")

    def replaces(self, name: str, *, corrects: str = "") -> Callable[[Any], Any]:  # type: ignore[override]
        return super().replaces(self.name, name, accepted={}, corrects=corrects)

    def apply(self, module: ModuleType, correct: bool) -> Patch:
        """Ours in place of those of its functions that the module has."""
        if not isinstance(module, ModuleType):
            raise TypeError(f"module: expected {self.name}'s module of losses, got {type(module).__name__}")
        with _PATCHING:
            patch = new_patch(self, lambda: self.found_in(module), correct=correct)
            say_skipped(self, patch.skipped, stacklevel=4)
            patch.keep()
        return patch

    def found_in(self, module: ModuleType) -> tuple[list[Found], dict[str, str]]:
        found, skipped = [], {}
        for replacement in self.replacements:
            theirs = vars(module).get(replacement.name)
            if theirs is None:
                continue
            signature = inspect.signature(theirs)
            expected = [p for p in inspect.signature(replacement.ours).parameters if p != "correct"]
            if list(signature.parameters) == expected:
                found.append(Found(replacement, module, replacement.name, theirs))
            else:
                skipped[replacement.path] = (
                    f"got {replacement.name}{signature} in {module.__name__}, expected the arguments "
                    f"{', '.join(expected)}"
                )
        if not found:
            names = ", ".join(r.name for r in self.replacements)
            reason = "; ".join(skipped.values()) or f"got the module {module.__name__}, which has none of {names}"
            raise ValueError(f"{self.name}: {reason}; nothing was patched")
        return found, skipped


def apply(library: str, *, check_version: bool, correct: bool) -> Patch:
    """Ours in place of theirs; the same call again does nothing."""
    with _requested(library, check_version, correct) as patch:
        patch.keep()
    return patch


@contextlib.contextmanager
def patched(*libraries: str, check_version: bool = True, correct: bool = False) -> Iterator[None]:
    """`apply_to_…` of one or several libraries for the length of a `with` block; what was patched before stays so.

    Blocks may be nested, and open in several threads at once: see `Patch`.
    """
    with contextlib.ExitStack() as stack:
        for library in libraries:
            with _requested(library, check_version, correct) as patch:
                patch.enter()
            stack.callback(patch.leave, kept=True)
        yield


@contextlib.contextmanager
def _requested(library: str, check_version: bool, correct: bool) -> Iterator[Patch]:
    """The patch that is in place if it has these options, a new one otherwise; under `_PATCHING`."""
    known = Library.every[_known(library)]
    if isinstance(known, Checkout):
        raise ValueError(f"library: got {library!r}, which is no package: apply_to_{library}(module) patches a module")
    known.load()
    options = {"check_version": check_version, "correct": correct}
    with _PATCHING:
        patch = Patch.active.get(library)
        if patch is None or patch.options != options:
            patch = new_patch(known, lambda: known.found(check_version), **options)
            say_skipped(known, patch.skipped, stacklevel=6)  # of the caller of `patched` or `apply_to_…`
        yield patch


def wrapped(found: Found, patch: Patch) -> FunctionType:
    """Theirs to look at, ours to run; theirs to run as well once the patch is gone, whoever may still hold it."""
    ours, theirs, path = found.replacement.ours, found.theirs, found.replacement.path
    if found.replacement.corrects:
        ours = functools.partial(ours, correct=patch.options["correct"])

    @functools.wraps(theirs)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = ours(*args, **kwargs) if patch.is_patched() else NotImplemented
        if result is NotImplemented:
            return theirs(*args, **kwargs)
        if torch.compiler.is_compiling():
            _count_compilation(path)
        else:
            _count(path)
        return result

    return wrapper  # type: ignore[return-value]


def _count(path: str) -> None:
    with _COUNTING:
        _CALLS[path] += 1


def _count_compilation(path: str) -> None:
    """Runs while the graph is made: a count inside of it would be a number to guard on, and compile anew for."""
    _count(path)


# what torch.compiler.assume_constant_result sets, without importing the compiler for it
_count_compilation._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Exchange(NamedTuple):
    """One function for another, in the module or class that holds it by this name."""

    holder: Any
    name: str
    old: Any
    new: Any

    @property
    def back(self) -> "Exchange":
        return self._replace(old=self.new, new=self.old)


def substitute(exchanges: Sequence[Exchange]) -> None:
    """Ours, each made by `functools.wraps` of theirs, in their place."""
    for each in exchanges:
        del each.new.__wrapped__  # type: ignore[attr-defined]  # it would be exchanged as any other reference to theirs
    exchange(exchanges)
    for each in exchanges:
        each.new.__wrapped__ = each.old  # type: ignore[attr-defined]


def exchange(exchanges: Sequence[Exchange]) -> None:
    """`new` wherever `old` is: its module or class, where it was imported to, tables, attributes of objects."""
    for holder, name, _, new in exchanges:
        setattr(holder, name, new)
    _exchange_references({id(each.old): (each.old, each.new) for each in exchanges})


def _exchange_references(pairs: Mapping[int, tuple[Any, Any]]) -> None:
    """By the identity of the first of each pair, the second. Finding who refers to them takes a look at everything."""
    methods = {}
    for referrer in gc.get_referrers(*(old for old, _ in pairs.values())):
        if isinstance(referrer, MethodType):  # bound before, and kept: pyro's SVI has those of its loss
            function = pairs[id(referrer.__func__)][1]
            methods[id(referrer)] = referrer, MethodType(function, referrer.__self__)
            continue
        if isinstance(referrer, list):
            for i, value in enumerate(referrer):
                if id(value) in pairs:
                    referrer[i] = pairs[id(value)][1]
            continue
        table = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", None)
        if not isinstance(table, dict) or isinstance(referrer, FunctionType):
            continue
        for key, old in [item for item in list(table.items()) if id(item[1]) in pairs]:  # others may change it
            new = pairs[id(old)][1]
            owner = _class_of(table, key, old)
            if owner is None:
                table[key] = new
            else:  # past a class's own setattr its cache would keep the old one
                setattr(owner, key, new)
    if methods:
        _exchange_references(methods)


def _class_of(table: dict[Any, Any], key: Any, function: Any) -> type | None:
    """The class whose namespace the table is, if any."""
    if "__module__" not in table:
        return None
    owners = (t for t in gc.get_referrers(table) if isinstance(t, type))
    return next((t for t in owners if vars(t).get(key) is function), None)


def unpatch(library: str | None = None) -> None:
    """The library's own functions again; None: those of every library."""
    with _PATCHING:
        for name in list(Patch.wanted) if library is None else [_known(library)]:
            for patch in list(Patch.wanted[name]):
                patch.unpatch()


def is_patched(library: str) -> bool:
    """Whether ours stand in for the library's functions."""
    return _known(library) in Patch.active


def calls(library: str | None = None) -> dict[str, int]:
    """How often each of ours has run, by the name of the function that it stands in for, since it was last put there.

    Counts outlive `unpatch`. Calls that went to the library's own function do not count.
    """
    known = Library.every.values() if library is None else [Library.every[_known(library)]]
    paths = {replacement.path for one in known for replacement in one.replacements}
    return {path: count for path, count in list(_CALLS.items()) if path in paths}


def _known(library: str) -> str:
    if library not in Library.every:
        raise ValueError(f"library: got {library!r}, expected one of {', '.join(map(repr, Library.every))}")
    return library


def as_theirs(result: Tensor, *inputs: Tensor) -> Tensor:
    """In the dtype that PyTorch's own operators would give: ours reduces fp16 and bf16 to fp32, as autocast does."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in inputs))
    if result.dtype == dtype or torch.is_autocast_enabled(result.device.type):
        return result
    return result.to(dtype)
