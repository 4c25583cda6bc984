"""Three sequences as a dense, a right-padded and a packed batch. Numbers are positions inside a chunk of four."""

from matplotlib.patches import Rectangle
from style import GREY, INK, LIGHT, SEQUENCES, sheet

C = 4
axes = sheet(6.4, 5.0, (-0.3, 17.3), (-1.3, 13.1))


def cells(row, lengths_and_colours, width):
    """Draw the cells of sequences from the left, paler in every second chunk, and padding up to `width`."""
    column = 0
    for length, colour in lengths_and_colours:
        for t in range(length):
            is_even_chunk = t // C % 2 == 0
            axes.add_patch(_square(column, row, colour, 0.9 if is_even_chunk else 0.55))
            axes.text(column + 0.5, row + 0.5, t % C, ha="center", va="center", color="white", fontsize=9)
            column += 1
    for padding in range(column, width):
        axes.add_patch(_square(padding, row, LIGHT, 1))


def _square(x, y, colour, alpha):
    return Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, alpha=alpha, linewidth=0)


axes.text(0, 12.4, "dense: x (3, 7, D), every row is a sequence", color=INK)
for row, colour in zip((11, 10, 9), SEQUENCES):
    cells(row, [(7, colour)], 7)
axes.text(0, 7.6, "right-padded: x (3, 7, D), lengths = (7, 3, 6)", color=INK)
for row, length, colour in zip((6, 5, 4), (7, 3, 6), SEQUENCES):
    cells(row, [(length, colour)], 7)
axes.text(0, 2.3, "packed: x (1, 17, D), cu_seqlens = (0, 7, 10, 16)", color=INK)
cells(0.9, list(zip((7, 3, 6), SEQUENCES)), 17)
for place in (0, 7, 10, 16):
    axes.text(place, 0.2, place, ha="center", va="center", color=GREY, fontsize=10)
axes.text(0, -1.0, "grey: in no sequence, zero output and zero gradient", color=GREY)
