"""The kernels of a new ComplexEMA: the weight of the input j positions back in an output."""

import megalodon_ops as mo
import torch
from style import new_cema, panels

layer, channels = new_cema()
impulse = torch.zeros(1, 64, 512)
impulse[0, 0] = 1
with torch.no_grad():
    p, q, gamma, omega = layer.coefficients()
    kernels = mo.cema(impulse, p, q, gamma, torch.zeros_like(omega))[0]

figure, axes = panels(6.4, 2.9)
for angle, channel, colour in channels:
    axes.plot(kernels[:, channel], color=colour, marker=".", markersize=4, linewidth=1.2, label=angle)
axes.axhline(0, color="#8c959f", linewidth=0.8)
axes.set(xlabel="positions back", ylabel="weight", xlim=(-0.5, 40))
axes.legend(title="a channel's angle")
figure.tight_layout()
