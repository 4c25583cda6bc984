"""Write the project's address into README.md and pyproject.toml, for the packages that a workflow publishes.

    python tools/name_repository.py https://github.com/<owner>/<name> <tag or commit>

Only the workflow that builds a release knows the address. Changes both files in place: relative links of the README,
which do not work on a package index, become absolute, and the package's metadata gets its links.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TARGET = re.compile(r"(!?)(\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def main() -> None:
    if len(sys.argv) != 3 or not sys.argv[1].startswith("https://"):
        sys.exit(__doc__)
    name_repository(ROOT, sys.argv[1].rstrip("/"), sys.argv[2])


def name_repository(root: Path, url: str, revision: str) -> None:
    readme, project = root / "README.md", root / "pyproject.toml"

    def absolute(link: re.Match) -> str:
        image, text, path, anchor = link.groups()
        kind = "raw" if image else "tree" if (root / path).is_dir() else "blob"
        return f"{image}{text}({url}/{kind}/{revision}/{path}{anchor or ''})"

    readme.write_text(_TARGET.sub(absolute, readme.read_text()))
    links = {"Repository": url, "Issues": f"{url}/issues", "Changelog": f"{url}/blob/{revision}/CHANGELOG.md"}
    text, count = re.subn(
        r"(?m)^\[project\.urls\]$",
        "\n".join(["[project.urls]", *(f'{name} = "{link}"' for name, link in links.items())]),
        project.read_text(),
    )
    if count != 1:
        sys.exit(f"{project}: must have one table [project.urls], got {count}")
    project.write_text(text)


if __name__ == "__main__":
    main()
