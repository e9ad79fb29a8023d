"""The commands: help and version everywhere, and a user's mistake is a line on stderr and an exit status."""

import errno
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unigen_fast as uf
from unigen_fast import _checks, _command_line, _coverage, bench, demo
from unigen_fast.__main__ import main
from unigen_fast.bench import harness

ROOT = Path(uf.__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "unigen_fast"]
MISTAKES = [
    ("inof", "got command 'inof', expected one of info, demo, bench, build; did you mean 'info'?"),
    ("--versoin", "unrecognized arguments: --versoin; did you mean --version?"),
    ("info --bogus", "unrecognized arguments: --bogus\n"),
    ("info --mdoels", "did you mean --models?"),
    ("info ops", "did you mean --ops?"),
    ("info --ops --models", "not allowed with argument --ops"),
    ("bench --pases=3", "did you mean --passes?"),
    ("bench --device cuda", "argument --device: got 'cuda', but PyTorch sees no GPU"),
    ("bench --device cuda:1", "argument --device: got 'cuda:1', but PyTorch sees no GPU"),
    ("bench --device gpu", "argument --device: got 'gpu', expected cpu or cuda"),
    ("bench --device mps", "argument --device: got 'mps', expected cpu or cuda"),
    ("bench --threads 0", "argument --threads: got '0', expected an integer >= 1"),
    ("bench --threads two", "argument --threads: got 'two', expected an integer >= 1"),
    ("bench --seconds -1", "argument --seconds: got '-1', expected a number >= 0"),
    ("bench --seconds nan", "argument --seconds: got 'nan'"),
    ("bench --seconds inf", "argument --seconds: got 'inf'"),
    ("bench --passes 0", "argument --passes: got '0', expected an integer >= 1"),
    ("bench --rows logit_64", "argument --rows: no row 'logit_64'; did you mean 'logits_64'?"),
    ("bench --rows 1,2", "argument --rows: no row '1'; there are "),
    ("bench --dtype bfloat61", "argument --dtype: no dtype 'bfloat61'; did you mean 'bfloat16'?"),
    ("bench --json nowhere/a.json", "argument --json: got 'nowhere/a.json', but there is no directory 'nowhere'"),
    ("bench --json file/a.json", "argument --json: got 'file/a.json', but there is no directory 'file'"),
    ("bench --json .", "argument --json: got the directory '.', expected a file"),
    ("bench --plot nowhere/a.png", "argument --plot: got 'nowhere/a.png', but there is no directory 'nowhere'"),
    ("bench --plot a.pgn", "argument --plot: got 'a.pgn', expected a file name with one of "),
    ("bench --compare file nowhere", "argument --compare: got 'file', expected a file that --json wrote"),
    ("bench --compare nowhere file", "argument --compare: 'nowhere': No such file or directory"),
    ("demo --device cuda", "argument --device: got 'cuda', but PyTorch sees no GPU"),
    ("demo --steps-scale 0", "argument --steps-scale: got '0', expected a number > 0"),
    ("demo --steps-scale inf", "argument --steps-scale: got 'inf', expected a number > 0"),
    ("demo --test-digits 15", "argument --test-digits: got '15', expected a multiple of 10 from 10 to 1000"),
    ("demo --test-digits 2000", "argument --test-digits: got '2000', expected a multiple of 10 from 10 to 1000"),
    ("demo --seed 18446744073709551616", "argument --seed: got '18446744073709551616', expected an integer of 64 bits"),
    ("demo --output file/pictures", "argument --output: got 'file/pictures', which cannot be made a directory: Not a"),
]


def lacks(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong is said before anything is measured or trained."""
    monkeypatch.setattr(bench, "new_record", lambda *_: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, "unigen_fast.demo.run", None)


@pytest.mark.parametrize("command", ["", "info", "demo", "bench"])
@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_and_version(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), option])
    printed = capsys.readouterr()
    assert end.value.code == 0 and not printed.err
    if option == "--version":
        assert printed.out == f"unigen_fast {uf.__version__}\n"
    else:
        assert printed.out.startswith(f"usage: python -m unigen_fast {command}".rstrip()) and "--version" in printed.out


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if re.match(" {4}\\w", line)] == ["info", "demo", "bench", "build"]


def test_without_a_command_it_is_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == f"{uf.info()}\n"


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=[command for command, _ in MISTAKES])
@pytest.mark.usefixtures("no_work")
def test_mistakes(
    command: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Usage and a line, and status 2."""
    if "--plot a." in command:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(demo, "REQUIRED", ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(SystemExit) as end:
        main(command.split())
    printed = capsys.readouterr()
    assert end.value.code == 2 and not printed.out
    usage, error = printed.err.rsplit("\npython -m unigen_fast", maxsplit=1)
    assert usage.startswith("usage: python -m unigen_fast")
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(("command", "extra"), [("bench --plot a.png", "bench"), ("demo", "demo")])
@pytest.mark.usefixtures("no_work")
def test_says_what_to_install(
    command: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lacks(monkeypatch, "matplotlib")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 1 and not any(tmp_path.iterdir())
    line = f'matplotlib not installed: pip install "unigen_fast[{extra}]"\n'
    assert capsys.readouterr().err.endswith(f"python -m unigen_fast {extra}: error: {line}")


def test_an_output_that_may_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it is for users other than root."""
    (tmp_path / "there.json").touch()
    asked: list[Path] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))
    for name in ("there.json", "new.json"):
        with pytest.raises(Exception, match="may not be written"):
            _command_line.output_file(str(tmp_path / name))
    with pytest.raises(SystemExit):
        demo._make_directory(demo._parser(), tmp_path)
    assert asked == [tmp_path / "there.json", tmp_path, tmp_path]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "python -m unigen_fast: error: [Errno 28] No space left ",
        ),
    ],
)
def test_no_traceback_of_what_is_no_bug(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(uf, "info", fail)
    assert main(["info"]) == status
    assert capsys.readouterr().err.startswith(line)


class _ClosedPipe(io.StringIO):
    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor

    def fileno(self) -> int:
        return self.descriptor

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("arguments", [["info"], ["info", "--help"]])
def test_closed_pipe(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "pipe", "w") as pipe:
        monkeypatch.setattr(sys, "stdout", _ClosedPipe(pipe.fileno()))
        assert main(arguments) == 141
        assert os.path.sameopenfile(pipe.fileno(), os.open(os.devnull, os.O_WRONLY))


def run(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_reader_that_has_enough() -> None:
    """As `info --ops | head -1`."""
    with run("info", "--ops") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(300) == 141


def test_interrupt() -> None:
    with run("bench", "--rows", "logits_64", "--no-compile", "--seconds", "600") as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("row"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
        assert process.wait(300) == 130


def test_the_package_alone_imports_no_command() -> None:
    heavy = ["_command_line", "__main__", "bench", "demo", "_coverage"]
    names = [*(f"unigen_fast.{name}" for name in heavy), "matplotlib", "mlxtend"]
    code = f"import sys, unigen_fast; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_every_alias_stands_for_an_option() -> None:
    options = [values for entry in _coverage.entries() for values in entry.options.values()]
    for alias, names in _checks._ALIASES.items():
        for name in names:
            hints = [_checks.did_you_mean(alias, values) for values in options if alias not in values]
            assert any(repr(name) in hint for hint in hints), f"{alias}: {name}"


# ---- progress --------------------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    """A terminal for stderr. No fixture: pytest has a stderr of its own for the test itself."""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = terminal_of(monkeypatch)
    seen = []
    for item in _command_line.progress("abc", "letters", name=str.upper):
        seen.append((item, terminal.getvalue().rpartition("letters")[2]))
    assert [item for item, _ in seen] == ["a", "b", "c"]
    for done, (item, shown) in enumerate(seen):
        assert f"{done}/3" in shown and item.upper() in shown
    assert terminal.getvalue().endswith("\r")  # and its line is free again


def test_lines_where_there_is_no_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    lacks(monkeypatch, "tqdm")
    now = iter([0.0, 0.0, 1.9, 2.0, 2.0, 3.9, 4.1, 4.1])
    monkeypatch.setattr(_command_line.time, "monotonic", lambda: next(now))
    assert list(_command_line.progress("abcde", "letters", name=str.upper)) == [*"abcde"]
    assert terminal.getvalue() == "letters: 2 of 5, C\nletters: 4 of 5, E\n"


@pytest.mark.parametrize("package", ["none", "tqdm"])
def test_quiet(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe, and if asked to be."""
    terminal = terminal_of(monkeypatch)
    lacks(monkeypatch, package)
    monkeypatch.setattr(_command_line, "_PATIENCE", 0.0)
    assert list(_command_line.progress("abc", "letters", quiet=True)) == [*"abc"]
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    assert list(_command_line.progress("abc", "letters")) == [*"abc"]
    assert terminal.getvalue() == ""


def test_bench_shows_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(harness, "_MEMORY_COPY", {"cpu": 2**20})
    options = ["--rows", "logits_64,gaussian_kl_tiny", "--no-compile", "--seconds", "0", "--device", "cpu"]
    assert main(["bench", *options, "--passes", "2"]) == 0
    shown, printed = terminal.getvalue(), capsys.readouterr().out
    for number in (1, 2):
        assert f"pass {number} of 2" in shown and "logits_64 (float32)" in shown and "gaussian_kl_tiny" in shown
    assert "\r" not in printed
    rows = [line for line in printed.splitlines() if line.startswith(("logits_64", "gaussian_kl_tiny"))]
    assert len(rows) == 2
