"""Public names of :mod:`megalodon_ops`."""

import torch  # loads the OpenMP runtime that the kernels share

from . import _C, reference
from .model.blocks import MegalodonBlock, NormalizedAttention, NormalizedFFN
from .model.config import MegalodonConfig
from .inference.decoder import Decoder
from .model.encoder import MegalodonEncoderConfig
from .inference.generation import TokenStream
from .model.layers import ComplexEMA, SequenceNorm, TimestepNorm, wide_parameters
from .inference.quantization import quantize
from .inference.quantized_layers import QuantizedLinear
from .storage.official import save_official
from .model.model_state import BlockState, MemoryBlockState
from .inference.stops import StopStrings
from .ops.adaptive_working_memory.adaptive_working_memory import adaptive_working_memory
from .ops.cema.bidirectional_cema import bidirectional_cema
from .ops.cema.cema import cema, cema_end_state
from .ops.cema.cema_coefficients import cema_coefficients
from .ops.chunked_attention.chunked_attention import chunked_attention
from .ops.gated_silu.gated_silu import gated_silu
from .ops.layer_norm.layer_norm import layer_norm, rms_norm
from .ops.linear.linear import linear
from .ops.linear_cross_entropy.linear_cross_entropy import linear_cross_entropy
from .ops.common.memory import keep_freed_memory, use_huge_pages
from .ops.normalized_attention.normalized_attention import normalized_attention
from .ops.normalized_qk.normalized_qk import normalized_qk
from .ops.common.exported_step import record
from .ops.quantized_linear.quantized_linear import quantize_weight, quantized_linear
from .ops.sequence_norm.sequence_norm import sequence_norm
from .ops.common.states import AttentionState, TimestepNormState, WorkingMemoryState
from .ops.timestep_norm.timestep_norm import timestep_norm, timestep_norm_end_state
from .public_models import Megalodon, MegalodonEncoder, MegalodonState, load_official

torch.serialization.add_safe_globals(
    [AttentionState, BlockState, MegalodonState, MemoryBlockState, TimestepNormState, WorkingMemoryState]
)

__version__: str = _C.build_info()["version"]

__all__ = [
    "AttentionState",
    "BlockState",
    "ComplexEMA",
    "Decoder",
    "Megalodon",
    "MegalodonBlock",
    "MegalodonConfig",
    "MegalodonEncoder",
    "MegalodonEncoderConfig",
    "MegalodonState",
    "MemoryBlockState",
    "NormalizedAttention",
    "NormalizedFFN",
    "QuantizedLinear",
    "SequenceNorm",
    "StopStrings",
    "TimestepNorm",
    "TimestepNormState",
    "TokenStream",
    "WorkingMemoryState",
    "adaptive_working_memory",
    "bidirectional_cema",
    "cema",
    "cema_coefficients",
    "cema_end_state",
    "chunked_attention",
    "gated_silu",
    "keep_freed_memory",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "load_official",
    "normalized_attention",
    "normalized_qk",
    "quantize",
    "quantize_weight",
    "quantized_linear",
    "record",
    "reference",
    "rms_norm",
    "save_official",
    "sequence_norm",
    "timestep_norm",
    "timestep_norm_end_state",
    "use_huge_pages",
    "wide_parameters",
]
