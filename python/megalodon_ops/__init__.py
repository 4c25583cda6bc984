"""MEGALODON (arXiv 2404.08801) for PyTorch: hand-written kernels as autograd ops, and a thin model on top.

B batch, L length, D model dim, N CEMA states a channel, G norm groups, H heads, K head dim of queries and keys, V head
dim of values, C chunk size, S sequences in a batch. Activations are (B, L, D).
"""

from . import startup as _startup

if _startup.is_command_line():
    _startup.prepare()

import torch as _torch  # loads the OpenMP runtime that the kernels share

from . import _C, reference
from .blocks import BlockState, MegalodonBlock, NormalizedAttention, NormalizedFFN
from .cema import cema
from .chunked_attention import chunked_attention
from .config import MegalodonConfig
from .decoder import Decoder
from .layers import ComplexEMA, TimestepNorm, wide_parameters
from .memory import keep_freed_memory, release_memory
from .model import Megalodon, MegalodonState
from .normalized_attention import normalized_attention
from .normalized_qk import normalized_qk
from .official import load_official
from .states import AttentionState, TimestepNormState
from .timestep_norm import timestep_norm

_torch.serialization.add_safe_globals([AttentionState, BlockState, MegalodonState, TimestepNormState])

__version__: str = _C.build_info()["version"]

__all__ = [
    "AttentionState",
    "BlockState",
    "ComplexEMA",
    "Decoder",
    "Megalodon",
    "MegalodonBlock",
    "MegalodonConfig",
    "MegalodonState",
    "NormalizedAttention",
    "NormalizedFFN",
    "TimestepNorm",
    "TimestepNormState",
    "cema",
    "chunked_attention",
    "keep_freed_memory",
    "load_official",
    "normalized_attention",
    "normalized_qk",
    "reference",
    "release_memory",
    "timestep_norm",
    "wide_parameters",
]
