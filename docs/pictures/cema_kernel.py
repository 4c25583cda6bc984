"""The kernels of a new ComplexEMA: the weight of the input j positions back in an output."""

import megalodon_ops as mo
import torch
from style import BLUE, GREEN, ORANGE, RED, panels

torch.manual_seed(3)
layer = mo.ComplexEMA(512, ndim=16)
order = layer.theta.flatten().argsort()  # channels by their angle
impulse = torch.zeros(1, 64, 512)
impulse[0, 0] = 1
with torch.no_grad():
    p, q, gamma, omega = layer.coefficients()
    kernels = mo.cema(impulse, p, q, gamma, torch.zeros_like(omega))[0]

figure, axes = panels(6.4, 2.9)
for quantile, colour in zip((0.05, 0.5, 0.8, 0.97), (BLUE, ORANGE, GREEN, RED)):
    channel = order[int(quantile * len(order))]
    label = f"{layer.theta[channel].sigmoid().item():.2g} turns"
    axes.plot(kernels[:, channel], color=colour, marker=".", markersize=4, linewidth=1.2, label=label)
axes.axhline(0, color="#8c959f", linewidth=0.8)
axes.set(xlabel="positions back", ylabel="weight", xlim=(-0.5, 40))
axes.legend(title="a channel's angle")
figure.tight_layout()
