"""Pairs of a row and a column that have a score, for a whole sequence and after a given state."""

import numpy as np
from matplotlib.colors import to_rgb
from style import BLUE, LIGHT, ORANGE, panels

C, L, POSITION = 4, 12, 3
figure, (whole, piece) = panels(6.4, 3.3, columns=2)


def draw(axes, first, title):
    """Draw the rows from `first` on; columns before `first` come from the state."""
    rows, columns = np.mgrid[first:L, 0:L]
    seen = (columns <= rows) & (columns // C == rows // C)
    colours = np.full((*seen.shape, 3), to_rgb(LIGHT))
    colours[seen] = to_rgb(BLUE)
    colours[seen & (columns < first)] = to_rgb(ORANGE)
    axes.pcolormesh(np.arange(L + 1), np.arange(first, L + 1), colours, edgecolors="white", linewidth=1.5)
    axes.set(aspect="equal", xlim=(0, L), ylim=(L, 0), xticks=range(0, L + 1, C), yticks=range(0, L + 1, C))
    axes.set_xlabel("column: key and value")
    axes.set_title(title, fontsize=11)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


draw(whole, 0, "12 positions, C = 4")
whole.set_ylabel("row: query")
draw(piece, POSITION, "after a state with 3 keys")
piece.text(1.0, 1.6, "orange: from the state", color=ORANGE, va="center")
figure.tight_layout()
