"""Operations for each token of a forward pass against the length of the text, of mega7.3B and of a Transformer."""

import megalodon_ops as mo
import numpy as np
from style import BLUE, GREY, ORANGE, panels, plain_ticks

config = mo.MegalodonConfig.preset("mega7.3B", vocab_size=32000)
matrices = 2 * (config.num_parameters() - config.vocab_size * config.model_dim)  # flops; the embedding is looked up
length = np.logspace(2, 6.3, 200)


def ours(length):
    """Flops a token; in each layer 2 (K + V) for each of half a chunk's keys, and 12 N + 2 a channel for CEMA."""
    pairs = (np.minimum(length, config.chunk_size) + 1) / 2
    attention = 2 * pairs * (config.z_dim + config.value_dim)
    return matrices + config.num_layers * (attention + config.model_dim * (12 * config.cema_ndim + 2))


def transformer(length):
    """Flops a token with as many parameters, 32 layers of width 4096, and attention to every token so far."""
    return matrices + 32 * 2 * (length + 1) / 2 * (4096 + 4096)


figure, axes = panels(6.4, 3.2)
axes.loglog(length, transformer(length) / 1e9, color=ORANGE, linewidth=2)
axes.loglog(length, ours(length) / 1e9, color=BLUE, linewidth=2)
axes.axvline(config.chunk_size, color=GREY, linewidth=0.8, linestyle=":")
axes.text(config.chunk_size * 0.9, 150, "C", color=GREY, ha="right")
axes.text(1.6e5, 80, "Transformer: attention\nto everything", color=ORANGE, ha="right", va="bottom")
axes.text(2e6, 12, "MEGALODON: attention to a chunk", color=BLUE, ha="right", va="top")
axes.set(xlabel="tokens of the text", ylabel="GFLOP a token", ylim=(8, 900))
plain_ticks(axes.xaxis, axes.yaxis)
figure.tight_layout()
