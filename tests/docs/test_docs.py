"""The pages build without warnings, document all public names, and show the measured errors."""

import html
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import megalodon_ops as mo
import pytest
from pages import PAGES, ROOT, name_of
from paths import load_module

from megalodon_ops.cli.flags import parse
from megalodon_ops.cli.options import COMMANDS


def load(script: str) -> ModuleType:
    """Load a script of docs/ as a module."""
    return load_module(ROOT / "docs" / script)


def index_entries() -> set[str]:
    """Return all pages in the toctrees of pages."""
    entries = set()
    for page in PAGES:
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", page.read_text(), re.S | re.M):
            named = (re.sub(r".*<(.*)>", r"\1", line.strip()) for line in tree.splitlines())
            patterns = [f"{name}.md" for name in named if name and not name.startswith(":")]
            entries |= {found.resolve() for pattern in patterns for found in matching(page.parent, pattern)}
    return entries


def matching(folder: Path, pattern: str) -> list[Path]:
    """The other pages of the folder for `*.md`, else the one page that is named."""
    if "*" not in pattern:
        return [folder / pattern]
    return [page for page in folder.glob(pattern) if page.name != "index.md"]


def test_every_page_is_in_the_menu():
    assert {*PAGES} - index_entries() == {ROOT / "docs" / "index.md"}


@pytest.mark.parametrize(
    "module", ["", ".distributed", ".evaluation", ".forecasting", ".hf", ".tokenizers", ".training"]
)
def test_every_public_name_has_a_page(module):
    try:
        public = importlib.import_module(f"megalodon_ops{module}").__all__
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "safetensors", "tqdm", "matplotlib", "transformers"):  # of extras
            raise
        pytest.skip(f"needs {error.name}")
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")) + load("conf.py").api_of_ops()
    documented = set(re.findall(rf":: megalodon_ops{re.escape(module)}\.(\w+)$", text, re.M))
    assert {*public} - {"reference"} <= documented


def test_every_reference_function_has_a_page():
    documented = re.findall(r":: megalodon_ops\.reference\.(\w+)$", load("conf.py").api_of_references(), re.M)
    assert sorted(documented) == sorted(mo.reference.__all__)


def test_pages_say_where_their_generated_lists_go():
    for page, (place, _) in load("conf.py").GENERATED.items():
        assert (ROOT / f"{page}.md").read_text().count(f"\n{place}\n") == 1


def test_the_walk_names_existing_files_and_functions():
    """CONTRIBUTING's walk from a call to the loop that computes."""
    walk = re.search(r"## From a call.*?\n## ", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[0]
    steps = re.findall(r"`([\w/]+\.\w+)`: ((?:`\w+`(?:, )?)+)", walk)
    assert len(steps) >= 12
    for path, names in steps:
        text = (ROOT / path).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"\b{name}\b", text), f"{path}: {name}"


def test_commands_on_pages_are_valid(capsys):
    refused, commands = [], 0
    for page in PAGES:
        for command in re.findall(r"megalodon[-_]ops ([a-z]+ -[^`\n|>]*)", page.read_text().replace("\\\n", "")):
            commands += 1
            try:
                parse(shlex.split(command, comments=True), COMMANDS)
            except SystemExit:
                refused.append(f"{name_of(page)}: {command}: {capsys.readouterr().err}")
    assert not refused, "\n".join(refused)
    assert commands > 20


COINED = {word: f"{word}s?" for word in "room strip panel slab job span piece floor relay".split()}
COINED |= {word: f"{word}s?" for word in ("wide parameter", "recorded step", "chunk group")}
COINED |= {
    "share": r"(?:rank|thread|process)'s shares?|shares? of (?:a|the|each) (?:rank|thread|process|tokens)",
    "round": r"(?:a|the|each|one|first|second) rounds?",
}
"""Patterns of the words that this project has used in a sense of its own"""


def prose(page: Path) -> str:
    """The page without code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", re.sub(r"^    .*$", "", text, flags=re.M))


def test_words_of_this_project_are_in_the_glossary():
    glossary = re.search(r"^## Glossary\n.*?(?=^## |\Z)", (ROOT / "docs" / "semantics.md").read_text(), re.M | re.S)[0]
    words = re.findall(r"^\| (\w[\w ]*) \|", glossary, re.M)[1:]
    assert len(words) <= 10 and len(words) == len({*words})
    assert {*words} <= {*COINED}, "add the word to COINED"
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]:
        text = prose(page)
        unknown = [word for word in {*COINED} - {*words} if re.search(rf"(?i)\b(?:{COINED[word]})\b", text)]
        assert not unknown, f"{name_of(page)}: use the field's words for {unknown}, or define them in the glossary"
    kernels = "".join(path.read_text() for root in ("cpp", "cuda") for path in (ROOT / root).rglob("*.*h"))
    unused = [word for word in re.findall(r"^\| (\w+) \| in kernels:", glossary, re.M) if word not in kernels]
    assert not unused, f"no header uses {unused}"


def test_code_on_pages_is_not_clipped():
    """A page of 1,280 pixels shows 88 columns of a block; formulas and directives are no code."""
    code = []
    for page in [*PAGES, *(ROOT / "bench").glob("*.md")]:
        fence = ""
        for line in page.read_text().splitlines():
            if line.startswith(("```", "$$")):
                fence = "" if fence else line
            elif not re.match(r"```(math|\{)|\$\$", fence) and (fence or line.startswith("    ")):
                code.append((name_of(page), line if fence else line[4:]))
    assert [(page, line) for page, line in code if len(line) > 88] == []
    assert len(code) > 800


def description(svg: Path) -> str:
    return html.unescape(re.search(r"<dc:description>(.*?)</dc:description>", svg.read_text())[1])


def test_pictures_of_the_readme_are_what_their_scripts_draw(tmp_path):
    """Bytes are equal under the same matplotlib, else the figures; alternative texts contain these figures."""
    matplotlib = pytest.importorskip("matplotlib")
    if not (ROOT / "bench" / "results").exists():
        pytest.skip("needs bench/results, which a source distribution does not hold")
    text = (ROOT / "README.md").read_text()
    shown = dict((path, alt) for alt, path in re.findall(r"!\[(.*?)\]\((docs/pictures/.*?)\)", text))
    pictures = load("pictures/readme.py")
    assert [*shown] == [f"docs/pictures/{name}.svg" for name in pictures.PICTURES]
    for path, alt in shown.items():
        drawn = pictures.draw(Path(path).stem, tmp_path)
        assert description(ROOT / path) == description(drawn), "run python docs/pictures/readme.py"
        if f"Matplotlib v{matplotlib.__version__}," in (ROOT / path).read_text():
            assert drawn.read_text() == (ROOT / path).read_text(), "run python docs/pictures/readme.py"
        for rates in json.loads(description(drawn)).values():
            for rate in rates.values():
                assert f"{rate:,.0f}" in alt, (rate, alt)


@pytest.mark.parametrize("page", sorted((ROOT / "bench" / "results").glob("20*.md")), ids=name_of)
def test_titles_of_results_have_processor_and_content(page):
    title, text = page.read_text().split("\n", 1)
    where = re.search(r"- (?:processor|card): ([^,\n]*)", text)[1]
    assert title.startswith(f"# {where}") and "times of" in title and title.endswith(page.name[:10])


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton", "sphinx-mathjax-offline", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of the extra `docs`")
    if not (ROOT / "bench" / "results").exists():
        pytest.skip("needs bench/results, which a source distribution does not hold")
    command = [sys.executable, "tools/build_docs.py", str(tmp_path / "pages")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "pages" / "docs" / "ops" / "cema.html").exists()
    assert dead_links(tmp_path / "pages") == []
    search = (tmp_path / "pages" / "searchindex.js").read_text()
    assert [word for word in ("forecast", "onnx", "chat", "quantiz") if f'"{word}":' not in search] == []  # stems


def dead_links(site: Path) -> list[str]:
    """Return the links between pages of the site that lead to no file, or to no anchor in it."""
    texts = {page.resolve(): page.read_text() for page in site.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    dead = []
    for page, text in texts.items():
        for link in set(re.findall(r'<a [^>]*href="([^":]+)"', text)):
            path, _, anchor = html.unescape(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors.get(target, {anchor})):
                dead.append(f"{page.relative_to(site.resolve())}: {link}")
    return sorted(dead)


@pytest.fixture(scope="module")
def error_tables():
    return load("error_tables.py")


def table_rows(lines: Iterable[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


@pytest.mark.slow
def test_errors_are_those_of_the_page(error_tables):
    page = (ROOT / "docs" / "numerics.md").read_text()
    for name, measured in error_tables.tables().items():
        shown = error_tables.page_pattern(name).search(page)[0]
        rows = table_rows(line for line in shown.splitlines() if line.startswith("| "))
        new_rows = table_rows(measured.splitlines())
        assert [row[0] for row in rows] == [row[0] for row in new_rows] and rows[0] == new_rows[0]
        for old_row, new_row in zip(rows[2:], new_rows[2:], strict=True):
            for old, new in zip(", ".join(old_row[1:]).split(", "), ", ".join(new_row[1:]).split(", "), strict=True):
                assert float(new) <= 3 * float(old), f"{name}, {new_row[0]}: {new}, the page shows {old}"
