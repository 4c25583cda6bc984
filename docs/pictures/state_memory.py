"""Bytes of a state against the length of the text, beside a Transformer's cache; both in bfloat16, one sequence."""

import megalodon_ops as mo
import numpy as np
import torch
from style import BLUE, GREY, ORANGE, panels, plain_ticks

config = mo.MegalodonConfig.preset("mega7.3B")
state = mo.MegalodonState.fresh(config, 1, dtype=torch.bfloat16, device="meta").nbytes
llama = 32 * 2 * 4096 * 2  # bytes a token: 32 layers, keys and values of 4096 numbers

length = np.logspace(2, 6.3, 200)
figure, axes = panels(6.4, 3.2)
axes.loglog(length, length * llama / 2**30, color=ORANGE, linewidth=2)
axes.loglog(length, np.full_like(length, state / 2**30), color=BLUE, linewidth=2)
axes.text(9e4, 90, "Transformer, 7B:\nevery key and value", color=ORANGE, ha="right", va="bottom")
axes.text(2e6, state / 2**30 * 0.8, "MEGALODON, 7.3B: one state", color=BLUE, ha="right", va="top")
axes.axvline(state / llama, color=GREY, linewidth=0.8, linestyle=":")
axes.set(xlabel="tokens read", ylabel="GiB a sequence")
plain_ticks(axes.xaxis, axes.yaxis)
figure.tight_layout()
