"""The ops and the model in plain torch: definitions that the kernels are tested against, and the mathematics.

Each op has a forward of the public signature, which autograd can differentiate, and a hand-derived backward `<op>_bwd`.
The ops are slow, as they loop over sequences and time. The models are not: they compute with matrices.
"""

from megalodon_ops.ops.adaptive_working_memory.adaptive_working_memory_reference import adaptive_working_memory
from megalodon_ops.ops.adaptive_working_memory.adaptive_working_memory_reference import adaptive_working_memory_bwd
from megalodon_ops.ops.cema.bidirectional_cema_reference import bidirectional_cema, bidirectional_cema_bwd
from megalodon_ops.ops.cema.cema_reference import cema, cema_bwd, cema_end_state, cema_end_state_bwd
from megalodon_ops.ops.cema.cema_coefficients_reference import cema_coefficients, cema_coefficients_bwd
from megalodon_ops.ops.chunked_attention.chunked_attention_reference import chunked_attention, chunked_attention_bwd
from megalodon_ops.ops.gated_silu.gated_silu_reference import gated_silu, gated_silu_bwd
from megalodon_ops.ops.layer_norm.layer_norm_reference import layer_norm, layer_norm_bwd, rms_norm
from megalodon_ops.ops.normalized_attention.normalized_attention_reference import normalized_attention
from megalodon_ops.ops.normalized_attention.normalized_attention_reference import normalized_attention_bwd
from megalodon_ops.ops.normalized_qk.normalized_qk_reference import normalized_qk, normalized_qk_bwd
from megalodon_ops.ops.quantized_linear.quantized_linear_reference import quantized_linear
from megalodon_ops.ops.sequence_norm.sequence_norm_reference import sequence_norm, sequence_norm_bwd
from megalodon_ops.ops.timestep_norm.timestep_norm_reference import timestep_norm, timestep_norm_bwd
from megalodon_ops.ops.timestep_norm.timestep_norm_reference import timestep_norm_end_state, timestep_norm_end_state_bwd
from megalodon_ops.reference.encoder_reference import MegalodonEncoder
from megalodon_ops.reference.megalodon_reference import Megalodon
from megalodon_ops.reference.numbers_reference import MegalodonOfNumbers

__all__ = [
    "Megalodon",
    "MegalodonEncoder",
    "MegalodonOfNumbers",
    "adaptive_working_memory",
    "adaptive_working_memory_bwd",
    "bidirectional_cema",
    "bidirectional_cema_bwd",
    "cema",
    "cema_bwd",
    "cema_coefficients",
    "cema_coefficients_bwd",
    "cema_end_state",
    "cema_end_state_bwd",
    "chunked_attention",
    "chunked_attention_bwd",
    "gated_silu",
    "gated_silu_bwd",
    "layer_norm",
    "layer_norm_bwd",
    "normalized_attention",
    "normalized_attention_bwd",
    "normalized_qk",
    "normalized_qk_bwd",
    "quantized_linear",
    "rms_norm",
    "sequence_norm",
    "sequence_norm_bwd",
    "timestep_norm",
    "timestep_norm_bwd",
    "timestep_norm_end_state",
    "timestep_norm_end_state_bwd",
]
