"""`python -m bench.summary`: the tables of README.md and docs/performance.md, from the newest page of results.

All figures are of one processor and one date. A full run of `python -m bench` prints the tables of its own page.
"""

import re
from pathlib import Path
from typing import NamedTuple

from .bench_model import DECODED

RESULTS = Path(__file__).with_name("results")


class Work(NamedTuple):
    """A bench's row in the tables, in all measured types."""

    label: str
    name: str
    shape: str
    tokens: int = 0
    """per call, to show tokens a second; 0: show milliseconds"""


OPS = (
    Work("`cema`, 8,192 positions of 1,024 channels", "forward + backward", "B 1 L 8192 D 1024 N 16"),
    Work("`timestep_norm`, the same", "forward + backward", "B 1 L 8192 D 1024 G 32"),
    Work(
        "`chunked_attention`, chunks of 2,048", "chunked_attention forward + backward", "L 8192 C 2048 K 256 V 2048 H 1"
    ),
    Work("linear layer, 2,048 rows, 512 to 2,048", "linear forward + backward", "T 2048 I 512 O 2048"),
)
MODELS = (
    Work("training step, 25M parameters, 2,048 tokens", "training step", "25M L 2048", 2048),
    Work("training step, 25M, 8,192 tokens", "training step", "25M L 8192", 8192),
    Work("training step, 200M, 2,048 tokens", "training step", "200M L 2048", 2048),
    Work("forward, 25M, 32,768 tokens", "forward", "25M L 32768", 32768),
    Work("decoding, 25M, after 1,000 tokens", "decode 16 tokens after 1000", "25M", 16),
    Work("decoding, 25M, after 32,744 tokens", "decode 16 tokens after 32744", "25M", 16),
)
README = (*OPS[:3], MODELS[0])
ENCODER = "encoder forward + backward"
LLAMA_CPP = "llama.cpp Q4_0"
"""A path of the bench `small_weights`, which are named by their weights; this package's int8 is measured as its own"""


class Row(NamedTuple):
    """Milliseconds of one work in one type with all threads, as on the page; empty if not measured."""

    type: str
    ours: str
    torch: str
    llama: str


class Page:
    """A page of results that `python -m bench` wrote."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        self.processor = re.search(r"- processor: (.*)", self.text)[1]
        self.cores = re.search(r"- cores: (\d+)", self.text)[1]
        self.date = path.name[:10]
        self.lines = _lines(self.text)

    def rows(self, work: Work) -> list[Row]:
        """Measurements of a work, in the page's order of types."""
        lines = [line for line in self.lines if (line["work"], line["shape"]) == (work.name, work.shape)]
        llamas = {line["type"]: line["warm ms"] for line in lines if line.get("path") == "Llama"}
        return [
            Row(line["type"], line["ms"], line["its ms"].rstrip("*"), llamas.get(line["type"], ""))
            for line in lines
            if line.get("cache") == "warm" and line["threads"] == self.cores
        ]

    def readme_table(self) -> list[str]:
        lines = [
            f"| float32, {self.cores} cores of an {self.processor}, {self.date} | this package | best in plain torch |",
            "|---|---|---|",
        ]
        for work in README:
            label = work.label if work.tokens else f"{work.label}, with backward"
            rows = [row for row in self.rows(work) if row.type == "fp32"]
            lines += [f"| {label} | {_shown(row.ours, work)} | {_shown(row.torch, work)} |" for row in rows]
        return lines

    def performance_table(self, works: tuple[Work, ...]) -> list[str]:
        llama = any(work.tokens for work in works)
        lines = [
            f"| {self.cores} cores of an {self.processor}, {self.date}; {'tokens/s' if llama else 'ms'} | type |"
            + " this package | best in plain torch |"
            + " Llama |" * llama,
            "|---|---|---|---|" + "---|" * llama,
        ]
        for work in works:
            for i, row in enumerate(self.rows(work)):
                cells = ["" if i else work.label, row.type, *(_number(value, work) for value in row[1 : 3 + llama])]
                lines.append(f"| {' | '.join(cells)} |")
        return lines

    def encoder_table(self) -> list[str]:
        """Tokens a second and peak MiB of every path, by the length of a row."""
        found: dict[str, dict[str, str]] = {}
        for line in self.lines:
            if line["work"] == ENCODER and "path" in line:
                length = line["shape"].split()[-1]
                speed = _number(line["warm ms"], Work("", "", "", int(length)))
                found.setdefault(length, {})[line["path"]] = f"{speed}; {line['peak MiB']}".removesuffix("; ")
        names = [*dict.fromkeys(name for paths in found.values() for name in paths)]
        lines = [
            f"| {self.cores} cores of an {self.processor}, {self.date}; tokens/s; MiB | {' | '.join(names)} |",
            "|---" * (1 + len(names)) + "|",
        ]
        for length, paths in found.items():
            lines.append(f"| {int(length):,} positions | {' | '.join(paths.get(name, '') for name in names)} |")
        return lines

    def decoding(self) -> dict[str, dict[str, float]]:
        """Tokens a second by path of `small_weights` and by work: after so many tokens, or reading a prompt."""
        found: dict[str, dict[str, float]] = {}
        for line in self.lines:
            if line["bench"] == "small_weights" and "path" in line:
                name = "int8" if line["path"] == "megalodon_ops" else line["path"]
                count = int(re.search(r"\d+", line["work"])[0])
                label = f"after {count:,} tokens" if line["work"].startswith("decode") else f"prompt of {count:,}"
                work = Work("", "", "", DECODED if label.startswith("after") else count)
                found.setdefault(name, {})[label] = tokens_a_second(line["warm ms"], work)
        return found

    def weights_table(self) -> list[str]:
        """Milliseconds of a token, and tokens a second of reading a prompt, by weights."""
        found = self.decoding()
        labels = [*next(iter(found.values()))]
        units = ["ms" if label.startswith("after") else "tokens/s" for label in labels]
        columns = [f"{label}, {unit}" for label, unit in zip(labels, units)]
        lines = [
            f"| {self.cores} cores of an {self.processor}, {self.date} | {' | '.join(columns)} |",
            "|---" * (1 + len(labels)) + "|",
        ]
        for name, rates in found.items():
            cells = [
                "" if label not in rates else f"{1000 / rates[label]:.1f}" if unit == "ms" else f"{rates[label]:,.0f}"
                for label, unit in zip(labels, units)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines


def text(path: Path) -> str:
    page = Page(path)
    parts = {
        "README.md, How fast": page.readme_table(),
        "docs/performance.md, Ops": page.performance_table(OPS),
        "docs/performance.md, Models": page.performance_table(MODELS),
    }
    if (encoder_page := newest_page_with(ENCODER)) is not None:
        parts["docs/performance.md, Encoder"] = encoder_page.encoder_table()
    if (weights_page := newest_page_with(LLAMA_CPP)) is not None:
        parts["docs/cpu.md, Weights of 8 and 4 bits"] = weights_page.weights_table()
    return "\n".join(f"{where}:\n\n" + "\n".join(lines) + "\n" for where, lines in parts.items())


def newest() -> Path:
    return sorted(RESULTS.glob("????-??-??-cpu.md"))[-1]


def newest_page_with(cell: str) -> Page | None:
    """The newest page of which a row has this cell; `python -m bench --only BENCH` writes one, too."""
    pages = [Page(path) for path in sorted(RESULTS.glob("????-??-??-cpu*.md")) if "quick" not in path.name]
    return next((page for page in reversed(pages) if f"| {cell} |" in page.text), None)


def _lines(page: str) -> list[dict[str, str]]:
    """Lines of all tables of works, as dicts by column and with their bench."""
    found, bench, head = [], "", []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.startswith("| ") else []
        if line.startswith("## "):
            bench = line.removeprefix("## ").strip()
        elif cells[:1] == ["work"]:
            head = cells
        elif head and len(cells) == len(head) and not cells[0].startswith("---"):
            found.append({"bench": bench, **dict(zip(head, cells, strict=True))})
    return found


def tokens_a_second(milliseconds: str, work: Work) -> float:
    return 1000 * work.tokens / float(milliseconds.replace(",", ""))


def _number(milliseconds: str, work: Work) -> str:
    return f"{tokens_a_second(milliseconds, work):,.0f}" if milliseconds and work.tokens else milliseconds


def _shown(milliseconds: str, work: Work) -> str:
    return f"{_number(milliseconds, work)} {'tokens/s' if work.tokens else 'ms'}"


if __name__ == "__main__":
    print(text(newest()))
