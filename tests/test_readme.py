"""The Python examples of the README and of all pages run as they stand, and links lead somewhere."""

import re

import pytest
from pages import PAGES, ROOT, follow, has_commands, has_examples, name_of

OF_OTHER_TESTS = ("docs/transformers.md",)  # test_hf_tools.py runs it, with a model in a folder
RUN = [page for page in PAGES if has_examples(page) and name_of(page) not in OF_OTHER_TESTS]


def test_there_are_examples():
    assert ROOT / "README.md" in RUN and len(RUN) >= 10


@pytest.mark.parametrize("page", [page for page in RUN if not has_commands(page)], ids=name_of)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if has_commands(page)], ids=name_of)
def test_examples_and_commands_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow(page, tmp_path)


OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
