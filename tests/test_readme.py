"""The Python examples of the README and of the pages in docs/ run as they stand, and links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHER_TESTS = ("transformers.md",)  # test_hf_tools.py runs it, with a model in a folder
EXAMPLES = {
    page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    for page in PAGES
    if page.name not in OF_OTHER_TESTS
}


def test_there_are_examples():
    assert len(EXAMPLES["README.md"]) >= 2


@pytest.mark.parametrize("page", [name for name, examples in EXAMPLES.items() if examples])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    scope = {}
    for code in EXAMPLES[page]:  # a later example may use the names of an earlier one
        exec(code, scope)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
