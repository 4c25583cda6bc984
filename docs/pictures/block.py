"""A block of MEGALODON, from its input at the bottom to its output at the top, and the two hops of its residual."""

from functools import partial

import style
from style import BLUE, GREEN, ORANGE

axes = style.sheet(6.4, 8.6, (-2.2, 10.4), (-0.5, 15.2))
arrow, box, node = (partial(draw, axes) for draw in (style.arrow, style.box, style.node))
symbol = partial(axes.text, style="italic")
STATE = "#dbe9f6"  # of boxes that keep a state between calls

symbol(5, -0.1, "x", ha="center", va="center", fontsize=14)
arrow((5, 0.2), (5, 1.2))
box(5, 1.5, "timestep norm", 3.2, colour=STATE)
arrow((5, 1.8), (5, 2.7))
box(5, 3.0, "CEMA", 3.2, colour=STATE)
arrow((5, 3.3), (5, 3.8))
box(5, 4.1, "RMS norm", 3.2)

arrow((5, 2.2), (8.7, 2.2), (8.7, 5.2))
symbol(5.15, 2.32, "t")
box(8.7, 5.5, "silu $W_v$", 2.0)
arrow((5, 4.4), (5, 5.2))
symbol(5.15, 4.55, "m")
box(5, 5.5, "$W_z$", 1.6)
arrow((5, 4.8), (2.5, 4.8), (2.5, 5.2))
box(2.5, 5.5, "silu $W_r$", 2.0)

arrow((5, 5.8), (5, 6.7))
symbol(5.15, 6.15, "z")
arrow((8.7, 5.8), (8.7, 6.7))
symbol(8.85, 6.15, "v")
box(6.85, 7.1, "normalized attention,\nin chunks of C positions", 5.4, height=1.0, colour=STATE)
arrow((5, 7.6), (5, 8.35))
node(5, 8.65, "×")
arrow((2.5, 5.8), (2.5, 8.65), (4.55, 8.65))
symbol(2.65, 7.1, "r")
arrow((5, 8.95), (5, 9.45))
box(5, 9.75, "$W_{h2}$", 1.6)
arrow((5, 10.05), (5, 10.5))
node(5, 10.8, "+")

arrow((2.5, 4.8), (0.5, 4.8), (0.5, 5.2))
box(0.5, 5.5, "$W_{h1}$", 1.3)
arrow((0.5, 5.8), (0.5, 10.8), (4.55, 10.8))

arrow((5, 11.1), (5, 11.4))
node(5, 11.7, "+")
arrow((5, 0.6), (-0.9, 0.6), (-0.9, 11.7), (4.55, 11.7), colour=ORANGE, width=2)
axes.text(-0.75, 8.5, "first hop", color=ORANGE, rotation=90, va="center")

arrow((5, 12.0), (5, 12.5))
symbol(5.15, 12.12, "y")
box(5, 12.95, "layer norm, feed-forward", 4.6, 0.75)
arrow((5, 13.35), (5, 13.7))
node(5, 14.0, "+")
arrow((5, 0.4), (-1.6, 0.4), (-1.6, 14.0), (4.55, 14.0), colour=GREEN, width=2)
axes.text(-2.05, 8.5, "second hop: from the block's input", color=GREEN, rotation=90, va="center")
arrow((5, 14.3), (5, 14.95))

axes.text(6.0, 14.45, "blue: has a state", color=BLUE)
