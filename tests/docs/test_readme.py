"""The Python examples of the README and of all pages run unchanged, and links have targets."""

import re
import sys

import pages
import pytest
from pages import PAGES, ROOT, SERIES, follow, has_commands, has_examples, name_of

from megalodon_ops.cli import data

TESTED_ELSEWHERE = ("docs/transformers.md",)  # by test_hf_tools.py, with a model in a folder
RUNNABLE = [p for p in PAGES if has_examples(p) and name_of(p) not in TESTED_ELSEWHERE and p not in SERIES]
PACKAGES = {
    "lora": ("transformers", "peft", "accelerate"),
    "forecast": ("statsmodels",),
    "serving": ("fastapi", "httpx"),
    "libraries": ("lightning", "xgrammar", "torchao", "bitsandbytes"),
    "elsewhere": ("onnx", "onnxscript", "onnxruntime"),
}
"""Packages that a page needs beyond the extra `train`"""


def test_there_are_examples():
    assert ROOT / "README.md" in RUNNABLE and len(RUNNABLE) >= 10


@pytest.mark.parametrize("page", [page for page in RUNNABLE if not has_commands(page)], ids=name_of)
def test_examples_run(page, tmp_path, monkeypatch):
    for package in PACKAGES.get(page.stem, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    follow(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUNNABLE if has_commands(page)], ids=name_of)
def test_examples_and_commands_run(page, tmp_path, monkeypatch):
    """Training without `--data` reads a tenth of the standard library."""
    for package in PACKAGES.get(page.stem, ()):
        pytest.importorskip(package)
    library = data.standard_library()[::10]
    monkeypatch.setattr(data, "standard_library", lambda: library)
    monkeypatch.chdir(tmp_path)
    follow(page, tmp_path)


@pytest.fixture(scope="module")
def folder_of_the_series(tmp_path_factory):
    """Folder after the first tutorial of the series."""
    folder = tmp_path_factory.mktemp("series")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        follow(SERIES[0], folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", SERIES[1:], ids=name_of)
def test_tutorials_follow_each_other(page, folder_of_the_series, monkeypatch):
    for package in PACKAGES.get(page.stem, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(folder_of_the_series)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    follow(page, folder_of_the_series)


def test_tutorials_link_to_the_next():
    for page in (ROOT / "docs" / "tutorials").glob("*.md"):
        last = page.read_text().rstrip().split("\n\n")[-1]
        assert "](" in last, name_of(page)
    for page, after in zip(SERIES, SERIES[1:]):
        assert "Next: [" in page.read_text() and f"({after.name})" in page.read_text()


@pytest.mark.parametrize(("python", "within"), [(sys.version_info[:2], 0.1), ((3, 0), 0.6)])
def test_figures_of_texts_of_another_python_have_another_tolerance(python, within, monkeypatch):
    monkeypatch.setattr(pages, "_PYTHON", python)
    found = pages.blocks_of("```text within 10 %, 60 % for another Python\n12 documents\n```\n")
    assert found == [pages.Block("text", "12 documents\n", within)]


def test_a_page_that_is_wrong_fails(tmp_path, monkeypatch):
    def follow_page(text):
        page = ROOT / "docs" / "wrong.md"
        monkeypatch.setattr(pages, "FOLLOWED", [page])
        monkeypatch.setattr(pages, "blocks", lambda _: pages.blocks_of(text))
        follow(page, tmp_path)

    follow_page("```python\n# saved.py\nprint(1 + 1)\n```\n\n```bash\ntest $(python saved.py) = 2\n```\n")
    follow_page("```python\nprint('other\\n1,040 steps in 9 s')\n```\n\n```text within 5 %\n1,000 steps in 2 s\n```\n")
    with pytest.raises(ZeroDivisionError):
        follow_page("```python\n1 / 0\n```\n")
    for shown in ("1,000 steps", "1,040 tokens", "1,040 steps\nother"):
        with pytest.raises(AssertionError, match="where its code prints"):
            follow_page(f"```bash\necho other\necho 1,040 steps\n```\n\n```text\n{shown}\n```\n")
    with pytest.raises(AssertionError, match="no_such_command"):
        follow_page("```bash\nno_such_command\n```\n")


OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_have_targets(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
