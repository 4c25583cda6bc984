"""MEGALODON (arXiv 2404.08801) for PyTorch: hand-written kernels as autograd ops, and a thin model on top.

B batch, L length, D model dim, N CEMA states a channel, G norm groups, H heads, K head dim of queries and keys, V head
dim of values, C chunk size, S sequences in a batch. Activations are (B, L, D).
"""

from .public import *
from .public import __all__, __version__
