"""The poles q of four channels of a new ComplexEMA, in the complex plane."""

import matplotlib.pyplot as plt
import megalodon_ops as mo
import torch
from style import BLUE, GREEN, GREY, ORANGE, RED, panels

torch.manual_seed(3)
layer = mo.ComplexEMA(512, ndim=16)
order = layer.theta.flatten().argsort()  # channels by their angle
with torch.no_grad():
    q = layer.coefficients()[1]

figure, axes = panels(6.4, 3.6)
axes.add_patch(plt.Circle((0, 0), 1, facecolor="none", edgecolor=GREY))
for quantile, colour in zip((0.05, 0.5, 0.8, 0.97), (BLUE, ORANGE, GREEN, RED)):
    channel = order[int(quantile * len(order))]
    label = f"{layer.theta[channel].sigmoid().item():.2g} turns"
    axes.plot(q[channel].real, q[channel].imag, "o", color=colour, markersize=5, label=label)
axes.axhline(0, color=GREY, linewidth=0.6)
axes.axvline(0, color=GREY, linewidth=0.6)
axes.set(aspect="equal", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
axes.set(xlabel="real part", ylabel="imaginary part")
axes.legend(loc="center left", bbox_to_anchor=(1.05, 0.5), title="a channel's angle")
figure.tight_layout()
