"""The poles q of four channels of a new ComplexEMA, in the complex plane."""

import matplotlib.pyplot as plt
import torch
from style import GREY, new_cema, panels

layer, channels = new_cema()
with torch.no_grad():
    q = layer.coefficients()[1]

figure, axes = panels(6.4, 3.6)
axes.add_patch(plt.Circle((0, 0), 1, facecolor="none", edgecolor=GREY))
for angle, channel, colour in channels:
    axes.plot(q[channel].real, q[channel].imag, "o", color=colour, markersize=5, label=angle)
axes.axhline(0, color=GREY, linewidth=0.6)
axes.axvline(0, color=GREY, linewidth=0.6)
axes.set(aspect="equal", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
axes.set(xlabel="real part", ylabel="imaginary part")
axes.legend(loc="center left", bbox_to_anchor=(1.05, 0.5), title="a channel's angle")
figure.tight_layout()
