"""README.md is short, its figures are measured, its code runs and its links exist; so do those of docs/."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import unigen_fast as uf
from unigen_fast.__main__ import main
from unigen_fast.bench import report

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benches" / "results"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "csrc" / "README.md", ROOT / "benches" / "README.md", ROOT / "examples" / "paper" / "README.md"]


def install_lines() -> list[str]:
    """The commands by which README.md installs the package."""
    (block,) = re.findall(r"<!-- install -->\n```sh\n(.*?)```", README.read_text(), re.DOTALL)
    return block.splitlines()


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(code: str, page: Path, scope: dict[str, Any]) -> None:
    exec(compile(code, str(page), "exec"), scope)


def anchors(page: Path) -> set[str]:
    """What a link to a heading says after its `#`."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    return broken


def test_it_is_short() -> None:
    text = README.read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(text.split()) <= 1200
    assert len(tables) == 1 and tables[0].count("\n") - 2 <= 10  # without the heading and the line below it


def test_the_first_screen_has_figures() -> None:
    first = "\n".join(README.read_text().splitlines()[:25])
    assert len(re.findall(r"^- \*\*.*\d×", first, re.MULTILINE)) == 3 and "<!-- /headline -->" in first


@pytest.mark.parametrize("page", [README, *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "models"))])
def test_figures_are_those_measured(page: Path) -> None:
    text = page.read_text()
    assert "<!-- /" in text and report.filled(text, RESULTS) == text


def test_the_headline_says_what_was_measured() -> None:
    """Its words hold for its figures: large gains above, none to speak of below."""
    steps = {step["step"]: step for step in json.loads((RESULTS / "cpu.json").read_text())["steps"]}
    libraries = {step["name"]: step for step in json.loads((RESULTS / "integrations.json").read_text())["steps"]}
    assert steps["step_beta_tcvae"]["ratio"] > 2 and libraries["scvi-zinb"]["faster_by"] > 1.2
    little = [steps[f"step_compiled_{name}"]["ratio"] for name in ("elbo", "discriminator")]
    little.append(libraries["pythae-VAE-bce"]["faster_by"])
    assert all(0.8 < ratio < 1.2 for ratio in little) and min(little) < 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path) -> None:
    assert broken_links(page) == []


def test_links_are_simple() -> None:
    """The metadata of a package has them with the project's address in front, put there by a pattern."""
    text = README.read_text()
    assert not re.search(r"<(a|img)\b|\]\[|^\[.*\]:", text, re.MULTILINE)
    assert all(re.fullmatch(r"[\w./#-]+", target) for target in re.findall(r"\]\(([^)]*)\)", text))


@pytest.mark.parametrize("code", blocks(README), ids=lambda code: code.split("\n")[3][:30])
def test_its_code_runs(code: str) -> None:
    try:
        run(code, README, {"__name__": "example"})
    finally:
        uf.integrations.unpatch()


@pytest.mark.parametrize("name", ["usage", "models"])
def test_code_of_pages_runs(name: str) -> None:
    """The blocks of a page, one after the other."""
    page = ROOT / "docs" / f"{name}.md"
    scope: dict[str, Any] = {"__name__": "example"}
    assert blocks(page)
    for code in blocks(page):
        run(code, page, scope)


def test_install_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """What installs, and a command that says what was installed."""
    install, command = install_lines()
    assert install.startswith("pip install ") and command.startswith("python -m unigen_fast ")
    assert main(command.split()[3:]) == 0 and uf.__version__ in capsys.readouterr().out
