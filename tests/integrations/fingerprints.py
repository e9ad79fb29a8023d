"""Whether the functions of the libraries' releases are those that the fused ones were compared with; installs nothing.

    python tests/integrations/fingerprints.py                 # each library's newest release and three older
    python tests/integrations/fingerprints.py scvi --releases 40
    python tests/integrations/fingerprints.py --page docs/integrations.md

The sources are read out of wheels, which stay in build/wheels. Fails where the newest release has another function than
those accepted; what cannot be fetched is named as skipped. The last form fetches nothing: it puts the table of accepted
releases into the page, between `<!-- integrations:releases -->` and `<!-- /integrations -->`.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from unigen_fast.integrations import _fingerprint, _patching  # noqa: E402

WHEELS = ROOT / "build" / "wheels"
PIP = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--python-version", "3.12"]
PIP += ["--retries", "2", "--timeout", "30", "--dest", str(WHEELS), "--only-binary", ":all:"]
OPTIONS = {
    "torch": ["--platform", "macosx_14_0_arm64"],  # its smallest wheels
    "torch-mimicry": ["--no-binary", "torch-mimicry", "--no-build-isolation"],  # it has no wheels
}


class Unavailable(Exception):
    """Says which release, and pip's last line."""


def releases(distribution: str, count: int) -> Iterator[Path]:
    """The archives of the newest `count` releases, newest first."""
    requirement = distribution
    for _ in range(count):
        command = [*PIP, *OPTIONS.get(distribution, []), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if requirement != distribution and re.search(r"from versions: (?!none)", done.stderr):
                return  # all that there are, none of them older
            raise Unavailable(f"{requirement}: {(done.stderr.strip() or 'pip failed').splitlines()[-1]}")
        archive = Path(re.findall(r"(?:Saved|already downloaded) (.+)$", done.stdout, re.MULTILINE)[-1])
        yield archive
        requirement = f"{distribution}<{version(archive)}"


def version(archive: Path) -> str:
    return archive.name.removesuffix(".tar.gz").split("-")[1].split("+")[0]


def sources(archive: Path, modules: set[str]) -> dict[str, str]:
    """The source of each of the modules that the archive has."""
    paths = {module: module.replace(".", "/") + ".py" for module in modules}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {module: wheel.read(path).decode() for module, path in paths.items() if path in wheel.namelist()}
    with tarfile.open(archive) as tar:
        found = {}
        for member in tar.getmembers():
            for module, path in paths.items():
                if member.name.endswith(f"/{path}") and (file := tar.extractfile(member)) is not None:
                    found[module] = file.read().decode()
        return found


def verdict(replacement: _patching.Replacement, source: str | None) -> str:
    """ "" of a function that is accepted."""
    found = _fingerprint.of_source(source, replacement.name) if source is not None else []
    if not found:
        return "is not there"
    unknown = [code for code in found if code not in replacement.accepted]
    return f"has another code, {', '.join(unknown)}" if unknown else ""


def check(distribution: str, replacements: list[_patching.Replacement], count: int) -> tuple[list[str], bool, bool]:
    """What to print of a distribution; whether its newest release has drifted; whether any could not be fetched."""
    lines, drifted = [], False
    try:
        for number, archive in enumerate(releases(distribution, count)):
            found = sources(archive, {r.module for r in replacements})
            bad = [f"  {r.path} {what}" for r in replacements if (what := verdict(r, found.get(r.module)))]
            lines += [f"{distribution} {version(archive)}: {len(replacements) - len(bad)}/{len(replacements)}", *bad]
            drifted |= number == 0 and bool(bad)
    except Unavailable as missing:
        return [*lines, f"{distribution}: SKIPPED, cannot be fetched: {missing}"], drifted, True
    return lines, drifted, False


def packages(libraries: list[str]) -> dict[str, list[_patching.Replacement]]:
    """The replacements by the distribution that has the function."""
    found: dict[str, list[_patching.Replacement]] = {}
    for library in _patching.Library.every.values():
        if library.distribution and (not libraries or library.name in libraries):
            for replacement in library.replacements:
                found.setdefault(replacement.distribution, []).append(replacement)
    return found


def table() -> str:
    rows = ["| package | functions | releases |", "|---|---|---|"]
    for distribution, replacements in packages([]).items():
        names: dict[str, list[str]] = {}
        for replacement in replacements:
            names.setdefault(", ".join(replacement.accepted.values()), []).append(f"`{replacement.name}`")
        rows += [f"| {distribution} | {', '.join(of)} | {releases} |" for releases, of in names.items()]
    return "\n".join(rows) + "\n"


def put_table(page: Path) -> None:
    text, count = re.subn(
        r"(<!-- integrations:releases -->\n).*?(<!-- /integrations -->)",
        lambda marks: marks[1] + table() + marks[2],
        page.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, f"{page}: expected one <!-- integrations:releases -->, got {count}"
    page.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", help="names as in `uf.integrations.patched`; none: all")
    parser.add_argument("--releases", type=int, default=4, help="how many of each, newest first (default: 4)")
    parser.add_argument("--page", type=Path, help="put the table of accepted releases into this file")
    options = parser.parse_args()
    if options.page:
        put_table(options.page)
        return 0
    WHEELS.mkdir(parents=True, exist_ok=True)
    wanted = packages(options.libraries)
    with ThreadPoolExecutor(len(wanted)) as pool:
        checks = list(pool.map(lambda item: check(*item, options.releases), wanted.items()))
    for lines, _, _ in checks:
        print("\n".join(lines))
    drifted = [name for name, (_, drift, _) in zip(wanted, checks, strict=True) if drift]
    skipped = [name for name, (_, _, skip) in zip(wanted, checks, strict=True) if skip]
    if skipped:
        print(f"SKIPPED: {', '.join(skipped)}")
    if drifted:
        print(f"DRIFTED: {', '.join(drifted)}: compare the new code's numbers with the fused ones', then accept it")
    return bool(drifted)


if __name__ == "__main__":
    sys.exit(main())
