"""How Sphinx renders this folder: `sphinx-build docs docs/_build` (`pip install -e ".[docs]"`)."""

import importlib.metadata
import re

project = "transformers_videollama"
release = importlib.metadata.version(project)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have them, with shapes
napoleon_use_rtype = False


def to_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are written as in `transformers`: Markdown, with [`Name`] for a link."""
    text = "\n".join(lines)
    text = re.sub(r"```\w*\n(.*?)```", lambda block: _code_block(block[1]), text, flags=re.DOTALL)
    text = re.sub(r"\[`~?([\w.]+)`\]", r"``\1``", text)
    text = re.sub(r"(?<![`:])`([^`\n]+)`(?![`_])", lambda literal: f"``{literal[1].strip()}``", text)
    lines[:] = text.split("\n")


def _code_block(code):
    indent = re.match(r"\s*", code)[0]
    return "::\n\n" + "".join(f"    {line}\n" if line.strip() else "\n" for line in code.splitlines()) + indent


def setup(app):
    # Before napoleon, which has the same event and the usual priority of 500
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)
