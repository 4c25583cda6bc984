"""Draws the pictures of the README, which a forge cannot draw, into SVG files beside this one: python docs/pictures/readme.py

The same scripts draw them in the site. A file ends with the figures that it shows.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
PICTURES = ("chunks", "against_llama")


def draw(name: str, folder: Path = HERE) -> Path:
    """Runs the script of a picture and saves what it drew, on white, so that it can be read on a dark page too."""
    sys.path.insert(0, str(HERE))
    try:
        import matplotlib.pyplot as plt

        plt.switch_backend("svg")
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "megalodon_ops"}):
            shown = runpy.run_path(str(HERE / f"{name}.py")).get("rates", {})
            target = folder / f"{name}.svg"
            plt.savefig(target, facecolor="white", metadata={"Date": None, "Description": json.dumps(shown)})
            plt.close("all")
    finally:
        sys.path.remove(str(HERE))
    return target


if __name__ == "__main__":
    for name in PICTURES:
        print(draw(name))
