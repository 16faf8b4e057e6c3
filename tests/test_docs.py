"""The documentation renders without a warning, its picture is what its script draws, and its examples are Python."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md")), *sorted((REPOSITORY / "examples").rglob("README.md"))]


def test_it_renders_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "VideoLlamaForConditionalGeneration" in (tmp_path / "api.html").read_text(encoding="utf-8")


def test_the_picture_is_what_its_script_draws(tmp_path: Path) -> None:
    script = shutil.copy(DOCS / "draw_data_flow.py", tmp_path)
    subprocess.run([sys.executable, str(script)], check=True)
    assert (tmp_path / "data_flow.svg").read_bytes() == (DOCS / "data_flow.svg").read_bytes()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_examples_are_python_and_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        ast.parse(code)
    for name in re.findall(r"\b(?:examples|benchmarks|conversion|docs|tests)/[\w./-]+\.(?:py|yaml|md)\b", text):
        assert (REPOSITORY / name).is_file(), f"{page.name} speaks of {name}, which is not there"
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", outside):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
