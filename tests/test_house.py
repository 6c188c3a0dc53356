"""The house is in order: imports point one way, documents tell the truth, nothing private is published."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import byol_fast as bf

ROOT = Path(__file__).parents[1]
TEXT = {".cpp", ".h", ".json", ".md", ".py", ".toml", ".run", ""}
GENERATED = {"build", "dist", "demo-output"}


def published() -> list[Path]:
    """The files of the repository that are text, without hidden folders (except .ci) and what a build leaves behind."""
    files = []
    for path in ROOT.rglob("*"):
        folders = path.relative_to(ROOT).parts[:-1]
        hidden = any(part.startswith(".") and part != ".ci" for part in folders)
        left_behind = hidden or any(
            part in GENERATED or part.endswith((".egg-info", "__pycache__")) for part in folders
        )
        if path.is_file() and path.suffix in TEXT and not left_behind and not path.name.startswith("."):
            files.append(path)
    return files


DOCUMENTS = sorted(path for path in published() if path.suffix == ".md")


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def in_fresh_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_imports_point_one_way() -> None:
    done = in_fresh_process("-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())")
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_imports_no_extra() -> None:
    extras = ("matplotlib", "sklearn", "PIL", "pandas", "pyarrow", "scipy", "triton")
    code = f"import sys, byol_fast; print([name for name in {extras} if name in sys.modules])"
    # torch brings some of them itself, where they are installed; its compiler, which its optimisers import, triton.
    plain = in_fresh_process("-c", code.replace("byol_fast", "torch._dynamo"))
    assert in_fresh_process("-c", code).stdout == plain.stdout


def test_public_names_exist_and_are_sorted() -> None:
    assert bf.__all__ == sorted(bf.__all__)
    for name in bf.__all__:
        assert getattr(bf, name) is not None


def test_the_version_is_the_same_everywhere() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == bf.__version__
    installed = [found.version for found in metadata.distributions() if found.name == "byol_fast"]
    assert set(installed) <= {bf.__version__}


def test_torch_is_pinned_to_one_version() -> None:
    pins = {
        pin
        for name in ("Makefile", ".ci/run")
        for pin in re.findall(r"torch==[0-9.]+", (ROOT / name).read_text(encoding="utf-8"))
    }
    assert len(pins) == 1


def test_no_file_names_a_place_of_one_machine() -> None:
    private = re.compile(r"/(?:home|root|Users|work|tmp/[a-z]+)/\w|index-url|https?://\S+@")
    allowed = {Path(__file__)}
    found = [
        f"{identify(path)}: {match.group()}"
        for path in published()
        if path not in allowed
        for match in private.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    broken = [link for link in links if link and "://" not in link and not (document.parent / link).exists()]
    assert broken == []


def test_the_examples_of_the_readme_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.S))
    assert code
    done = in_fresh_process("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_readme_only_names_targets_that_make_knows() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{name}: make {target}"
