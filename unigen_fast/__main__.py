"""The commands: `python -m unigen_fast info | demo | bench | build`, also installed as `unigen-fast`."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

import unigen_fast
from unigen_fast import _checks
from unigen_fast._command_line import PROGRAM, Parser

Main = Callable[[Sequence[str]], int]


def _info(argv: Sequence[str]) -> int:
    parser = Parser("info", "Versions, the device, which kernels are loaded, and why the others are not.")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--ops", action="store_true", help="also every function's ops, and which layers have kernels")
    tables.add_argument("--models", action="store_true", help="instead, what each model minimises: a table in Markdown")
    options = parser.parse_args(argv)
    if options.ops:
        from unigen_fast import _coverage

        print(_coverage.table(unigen_fast.info().backends))
    elif options.models:
        print(unigen_fast.models.table())
    else:
        print(unigen_fast.info())
    return 0


def _main_of(module: str) -> Main:
    return lambda argv: importlib.import_module(module).main(argv)


_COMMANDS: dict[str, tuple[Main, str]] = {
    "info": (_info, "which kernels are loaded, and why the others are not"),
    "demo": (_main_of("unigen_fast.demo"), "train a GAN, IWGAN, VAE and AAVAE on real digits, and compare them"),
    "bench": (_main_of("unigen_fast.bench"), "time the fused losses against eager PyTorch and torch.compile"),
    "build": (_main_of("unigen_fast._build"), "compile kernels for the installed PyTorch"),
}


def _run(argv: Sequence[str]) -> int:
    parser = Parser("", "Fused losses of deep generative models for PyTorch.")
    commands = parser.add_subparsers(title="commands", metavar="command", parser_class=argparse.ArgumentParser)
    for name, (_, what) in _COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    # the rest is parsed by the command itself, so that only its own modules are imported
    end = next((i for i, argument in enumerate(argv) if not argument.startswith("-")), len(argv))
    parser.parse_args(argv[:end])
    command = argv[end] if end < len(argv) else ""
    if command not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        parser.error(f"got command {command!r}, expected one of {known}{_checks.did_you_mean(command, _COMMANDS)}")
    run, _ = _COMMANDS[command]
    return run(argv[end + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, `info` if none is given, and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["info"]
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, and not at exit, so that a closed pipe is noticed below
    except BrokenPipeError:
        # Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT
    except OSError as error:  # a full disk, a file that is not there
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
