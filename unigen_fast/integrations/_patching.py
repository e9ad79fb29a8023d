"""Our losses under another library's names, and away again.

A module of this package lists the functions that it stands in for (`Library.replaces`); a `Patch` puts them in place.
"""

import ast
import collections
import contextlib
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

_CALLS: collections.Counter[str] = collections.Counter()


class Replacement(NamedTuple):
    """One of the library's functions and ours for it."""

    module: str
    name: str  # as in the module: "VAE.loss_function"
    ours: Callable[..., Any]  # takes the same arguments; NotImplemented: theirs is to run
    code: str  # fingerprint of the function that ours was compared with
    corrects: str  # what correct=True changes, if ours takes it

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


Found = tuple[Replacement, Any, str, FunctionType]  # what holds the function, its name there, and theirs


class Library:
    """Another library and the functions that have one of ours."""

    every: ClassVar[dict[str, "Library"]] = {}

    def __init__(self, name: str, distribution: str, tested: str) -> None:
        self.name = name
        self.distribution = distribution
        self.tested = tested
        self.replacements: list[Replacement] = []
        Library.every[name] = self

    def replaces(self, module: str, name: str, *, code: str, corrects: str = "") -> Callable[[Any], Any]:
        """Marks a function of ours: same arguments and, with `corrects`, a keyword `correct`."""

        def mark(ours: Callable[..., Any]) -> Callable[..., Any]:
            self.replacements.append(Replacement(module, name, ours, code, corrects))
            return ours

        return mark

    def found(self, check_version: bool) -> list[Found]:
        """Each replacement with what holds the function, its name there and the function itself, all checked."""
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"{self.name}: not installed (pip install {self.distribution})") from None
        found = []
        for replacement in self.replacements:
            *classes, name = replacement.name.split(".")
            holder: Any = importlib.import_module(replacement.module)
            try:
                for part in classes:
                    holder = getattr(holder, part)
                theirs = vars(holder)[name]
            except (AttributeError, KeyError):
                raise RuntimeError(
                    f"{self.name} {version}: has no {replacement.path}, which {self.distribution} {self.tested} has; "
                    "nothing was patched"
                ) from None
            if check_version and fingerprint(theirs) != replacement.code:
                raise RuntimeError(
                    f"{self.name} {version}: {replacement.path} is not the function of {self.distribution} "
                    f"{self.tested}, with which ours was compared; nothing was patched (check_version=False patches)"
                )
            found.append((replacement, holder, name, theirs))
        return found


class Patch:
    """The functions of a library that ours stand in for, until `unpatch()` or the end of a `with` block."""

    active: ClassVar[dict[str, "Patch"]] = {}

    def __init__(self, library: str, correct: bool, exchanges: "tuple[Exchange, ...]") -> None:
        self.library = library
        self.correct = correct
        self._exchanges = exchanges

    def is_patched(self) -> bool:
        return Patch.active.get(self.library) is self

    def calls(self) -> dict[str, int]:
        """How often each of ours has run since it was put in place."""
        return calls(self.library)

    def unpatch(self) -> None:
        """Theirs again, wherever ours has got to. A second time does nothing."""
        if self.is_patched():
            exchange([each.back for each in self._exchanges])
            del Patch.active[self.library]

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        state = "patched" if self.is_patched() else "not patched"
        return f"<{self.library}, {len(self._exchanges)} functions, correct={self.correct}: {state}>"


class Checkout(Library):
    """A repository that is no package: the user hands over its module of losses."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "", "")

    def replaces(self, name: str, *, corrects: str = "") -> Callable[[Any], Any]:  # type: ignore[override]
        return super().replaces(self.name, name, code="", corrects=corrects)

    def apply(self, module: ModuleType, correct: bool) -> Patch:
        """Ours in place of those of its functions that the module has."""
        if not isinstance(module, ModuleType):
            raise TypeError(f"module: expected {self.name}'s module of losses, got {type(module).__name__}")
        active = Patch.active.get(self.name)
        if active is not None:
            active.unpatch()
        found: list[Found] = []
        for replacement in self.replacements:
            theirs = vars(module).get(replacement.name)
            if theirs is None:
                continue
            expected = [p for p in inspect.signature(replacement.ours).parameters if p != "correct"]
            if list(inspect.signature(theirs).parameters) != expected:
                raise ValueError(
                    f"{self.name}: got {replacement.name}{inspect.signature(theirs)} in {module.__name__}, "
                    f"expected the arguments {', '.join(expected)}; nothing was patched"
                )
            found.append((replacement, module, replacement.name, theirs))
        if not found:
            names = ", ".join(r.name for r in self.replacements)
            raise ValueError(f"{self.name}: got the module {module.__name__}, which has none of {names}")
        return put(self.name, found, correct)


def apply(library: str, *, check_version: bool, correct: bool) -> Patch:
    """Ours in place of theirs; the same call again does nothing."""
    known = Library.every[_known(library)]
    if isinstance(known, Checkout):
        raise ValueError(f"library: got {library!r}, which is no package: apply_to_{library}(module) patches a module")
    active = Patch.active.get(library)
    if active is not None:
        if active.correct == correct:
            return active
        active.unpatch()
    return put(library, known.found(check_version), correct)


def put(library: str, found: list[Found], correct: bool) -> Patch:
    exchanges = tuple(Exchange(holder, name, theirs, _wrapped(r, theirs, correct)) for r, holder, name, theirs in found)
    for replacement, *_ in found:
        _CALLS[replacement.path] = 0
    substitute(exchanges)
    patch = Patch.active[library] = Patch(library, correct, exchanges)
    return patch


def _wrapped(replacement: Replacement, theirs: FunctionType, correct: bool) -> FunctionType:
    ours, path = replacement.ours, replacement.path
    if replacement.corrects:
        ours = functools.partial(ours, correct=correct)

    @functools.wraps(theirs)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = ours(*args, **kwargs)
        if result is NotImplemented:
            return theirs(*args, **kwargs)
        if torch.compiler.is_compiling():
            _count_compilation(path)
        else:
            _CALLS[path] += 1
        return result

    return wrapper  # type: ignore[return-value]


def _count_compilation(path: str) -> None:
    """Runs while the graph is made: a count inside of it would be a number to guard on, and compile anew for."""
    _CALLS[path] += 1


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
        for key, old in [(key, value) for key, value in table.items() if id(value) in pairs]:
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


def fingerprint(function: FunctionType) -> str:
    """Of a function's code, whatever its layout, comments and docstring; "" where the source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    definition = tree.body[0]
    if isinstance(definition, ast.FunctionDef) and ast.get_docstring(definition) is not None:
        del definition.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def unpatch(library: str | None = None) -> None:
    """The library's own functions again; None: those of every library."""
    for patch in list(Patch.active.values()) if library is None else [Patch.active.get(_known(library))]:
        if patch is not None:
            patch.unpatch()


def is_patched(library: str) -> bool:
    """Whether ours stand in for the library's functions."""
    return _known(library) in Patch.active


@contextlib.contextmanager
def patched(*libraries: str, check_version: bool = True, correct: bool = False) -> Iterator[None]:
    """`apply_to_…` of one or several libraries for the length of a `with` block; what was patched before stays so."""
    with contextlib.ExitStack() as stack:
        for library in libraries:
            before = Patch.active.get(_known(library))
            patch = apply(library, check_version=check_version, correct=correct)
            if before is not patch:
                stack.callback(_restore, library, before)
        yield


def _restore(library: str, before: Patch | None) -> None:
    if before is None:
        unpatch(library)
    else:
        apply(library, check_version=False, correct=before.correct)


def calls(library: str | None = None) -> dict[str, int]:
    """How often each of ours has run, by the name of the function that it stands in for, since it was last put there.

    Counts outlive `unpatch`. Calls that went to the library's own function do not count.
    """
    known = Library.every.values() if library is None else [Library.every[_known(library)]]
    paths = {replacement.path for one in known for replacement in one.replacements}
    return {path: count for path, count in _CALLS.items() if path in paths}


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
