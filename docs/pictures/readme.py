"""Draw the README's pictures into SVG files in this folder: python docs/pictures/readme.py

The site draws them by the same scripts.
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
    """Run a picture's script and save the picture on white, with the script's `rates` as its description."""
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
