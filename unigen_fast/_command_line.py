"""What the commands share: their parser, the types of their arguments, and progress."""

import argparse
import difflib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from unigen_fast._version import __version__

PROGRAM = "python -m unigen_fast"
_PATIENCE = 2.0  # seconds without a line where there is no bar

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A command's arguments, with `--version` and a suggestion for a misspelt option.

    `error` ends the command with status 2 for a mistake in its arguments, `fail` with status 1 for anything else.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"{PROGRAM} {command}".rstrip(), description=description)
        self.add_argument("--version", action="version", version=f"unigen_fast {__version__}")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = {option.lstrip("-"): option for option in self._option_string_actions}
            near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], names, n=1)
            hint = f"; did you mean {names[near[0]]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options

    def fail(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {message}\n")

    def require(self, packages: Sequence[str], extra: str) -> None:
        """Fails unless the packages, which the named extra brings, are installed."""
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            self.fail(f'{", ".join(missing)} not installed: pip install "unigen_fast[{extra}]"')


# ---- types of arguments ----------------------------------------------------------------------------------------------


def number(kind: Callable[[str], T], expected: str, accepts: Callable[[T], bool]) -> Callable[[str], T]:
    """A number that is accepted; `expected` says in words which are."""

    def parse(text: str) -> T:
        try:
            value = kind(text)
            if accepts(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")

    return parse


def device(text: str) -> str:
    """A device that PyTorch sees."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"got {text!r}, but PyTorch sees {f'{count} GPUs' if count else 'no GPU'}")
    return text


def output_file(text: str) -> Path:
    """A path that can be written to, as far as can be told without doing so."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got the directory {text!r}, expected a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, but there is no directory {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text!r}, which may not be written")
    return path


# ---- progress --------------------------------------------------------------------------------------------------------


def progress(
    items: Sequence[T], title: str, name: Callable[[T], str] | None = None, quiet: bool = False
) -> Iterator[T]:
    """The items, one by one. If stderr is a terminal it shows how many are done and, with `name`, which one is next:
    in tqdm's bar or, without tqdm, in a line every two seconds."""
    if quiet or not sys.stderr.isatty():
        yield from items
    elif importlib.util.find_spec("tqdm") is None:
        shown = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - shown >= _PATIENCE:
                what = f", {name(item)}" if name else ""
                print(f"{title}: {done} of {len(items)}{what}", file=sys.stderr, flush=True)
                shown = time.monotonic()
            yield item
    else:
        from tqdm import tqdm

        with tqdm(total=len(items), desc=title, leave=False) as bar:
            for item in items:
                if name:
                    bar.set_postfix_str(name(item))
                yield item
                bar.update()


def print_above(line: str) -> None:
    """Prints a line of results; a bar, if one is shown, makes way."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(line)
        sys.stdout.flush()
    else:
        print(line, flush=True)
