"""Chunks of a sequence, and the information that crosses their borders."""

from style import BLUE, GREEN, GREY, INK, LIGHT, ORANGE, sheet

C, CHUNKS = 4, 4
L = C * CHUNKS
axes = sheet(6.4, 5.0, (-0.4, L + 0.4), (-4.9, 8.3))

for chunk in range(CHUNKS):
    left = chunk * C
    axes.fill_between([left, left + C], -3.0, 5.6, color=LIGHT if chunk % 2 else "white", linewidth=0, zorder=0)
    axes.text(left + C / 2, 5.1, f"chunk {chunk}", ha="center", color=GREY)
    for row in range(C):
        axes.barh(3.9 - 0.8 * row, row + 0.9, height=0.7, left=left + 0.05, color=BLUE, alpha=0.55 + 0.12 * row)
axes.text(
    0,
    6.9,
    "attention: a position (row) sees its chunk up to itself;\nno key or value crosses a border",
    color=BLUE,
)

for y, colour, text in (
    (0.2, ORANGE, "CEMA: N complex numbers a channel, a decaying sum of all positions"),
    (-1.3, GREEN, "timestep norm: count, mean and variance of all positions"),
):
    axes.annotate("", (L + 0.3, y), (0, y), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 3})
    axes.text(0.1, y - 0.72, text, color=colour)

begin = 0
for length in (5, 1, 7, 3):
    axes.plot([begin + 0.08, begin + length - 0.08], [-2.75] * 2, color=INK, linewidth=4, solid_capstyle="butt")
    begin += length
axes.text(
    0.1,
    -4.6,
    "calls may end anywhere: between them, a state holds both of these\nand the keys and values of the unfinished chunk",
    color=INK,
)
