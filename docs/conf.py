"""Sphinx configuration of the pages: `python tools/build_docs.py` builds them.

The source directory is the repository, so that links between docs/, the README and the benches work here as on a forge.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import megalodon_ops

REPOSITORY = Path(__file__).parent.parent

project = "megalodon_ops"
author = "the authors of megalodon_ops"
release = version = megalodon_ops.__version__
root_doc = "docs/index"

include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "bench/**.md", "tests/**/README.md"]
exclude_patterns = [".*", "build", "dist", "runs", "**/__pycache__"]

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]

html_theme = "furo"
html_title = "megalodon_ops"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
pygments_style = "friendly"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_fence_as_directive = ["math"]  # as on forges
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

plot_basedir = "pictures"
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_rcparams = {"svg.fonttype": "path", "svg.hashsalt": "megalodon_ops"}
plot_apply_rcparams = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

_SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Yields):$")


def keep_formulas_as_written(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring's indented formulas into literal blocks, and escape | and * in references' text.

    The text ends at the first section, such as `Args:`.
    """
    if lines and lines[0].startswith("Alias for field number"):  # default docstring of a named tuple's field
        lines.clear()
    is_plain_text = ".reference." in name or name.endswith("_reference")
    result = []
    in_block = False
    for i, line in enumerate(lines):
        if _SECTION.match(line):
            result += lines[i:]
            break
        if line.strip():
            indented = line.startswith("  ")
            if indented and not in_block and result and not result[-1].strip() and _ends_a_paragraph(result):
                result += [".. code-block:: text", ""]
                in_block = True
            in_block = in_block and indented
            if is_plain_text and not in_block and not line.startswith((">>>", "...")):
                line = re.sub(r"([|*])", r"\\\1", line)
        result.append(line)
    lines[:] = result


def _ends_a_paragraph(lines: list[str]) -> bool:
    """Return True if the last non-blank line is text, not a directive or its content."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return bool(last) and not last.startswith((" ", "..", ">>>"))


_attributes: dict[str, list[str]] = {}


def hide_attribute(app, what, name, obj, options, lines: list[str]) -> None:
    """Hide an attribute's docstring from napoleon, which reads words before a colon as a type."""
    if what == "attribute":
        _attributes[name] = list(lines)


def restore_attribute(app, what, name, obj, options, lines: list[str]) -> None:
    if what == "attribute":
        lines[:] = _attributes.pop(name)


def functions_by_module(package: ModuleType) -> dict[str, list[str]]:
    """Return a package's public functions defined in megalodon_ops/ops/<op>/, by module, sorted by the op's name."""
    found = defaultdict(list)
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isfunction(value) and re.match(r"megalodon_ops\.ops\.(?!common\.)", value.__module__):
            found[value.__module__].append(name)
    return {module: found[module] for module in sorted(found, key=_op_name)}


def _op_name(module: str) -> str:
    """Return the last part of a module's name, without the suffix of references."""
    return module.rpartition(".")[2].removesuffix("_reference")


def api_of_ops() -> str:
    """Return a section for each folder of ops, with its public functions."""
    sections = defaultdict(list)
    for module, names in functions_by_module(megalodon_ops).items():
        folder = module.split(".")[2]
        sections[folder] += [f".. autofunction:: megalodon_ops.{name}" for name in names]
    return _sections(sections)


def api_of_references() -> str:
    """Return a section of the models, and one for each module of references."""
    reference = importlib.import_module("megalodon_ops.reference")
    models = {"Megalodon": "forward, fresh", "MegalodonOfNumbers": "forward, fresh", "MegalodonEncoder": "forward"}
    sections = {"megalodon": []}
    for name, members in models.items():
        sections["megalodon"] += [f".. autoclass:: megalodon_ops.reference.{name}", f"   :members: {members}", ""]
    for module, names in functions_by_module(reference).items():
        functions = [f".. autofunction:: megalodon_ops.reference.{name}" for name in names]
        sections[_op_name(module)] = [f".. automodule:: {module}", "   :no-members:", *functions]
    return _sections(sections)


def _sections(directives: dict[str, list[str]]) -> str:
    """Return Markdown: a heading and a block of directives for each title."""
    parts = []
    for title, lines in directives.items():
        parts += [f"## {title}\n", "```{eval-rst}", *lines, "```\n"]
    return "\n".join(parts)


GENERATED = {
    "docs/api/ops": ("<!-- api_of_ops -->", api_of_ops),
    "docs/api/reference": ("<!-- api_of_references -->", api_of_references),
}


def insert_lists(app, docname: str, source: list[str]) -> None:
    """Fill in the lists of exported ops."""
    if docname in GENERATED:
        place, generate = GENERATED[docname]
        before, after = source[0].split(place)
        source[0] = before + generate() + after


def redirect_root_to_index(app, exception) -> None:
    """Write an index.html that leads to docs/index.html."""
    if exception is None and app.builder.name == "html":
        page = '<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(f'{page}<a href="docs/index.html">megalodon_ops</a>\n')


def setup(app) -> None:
    app.connect("source-read", insert_lists)
    app.connect("autodoc-process-docstring", keep_formulas_as_written, priority=498)
    app.connect("autodoc-process-docstring", hide_attribute, priority=499)  # napoleon's is 500
    app.connect("autodoc-process-docstring", restore_attribute, priority=501)
    app.connect("build-finished", redirect_root_to_index)
