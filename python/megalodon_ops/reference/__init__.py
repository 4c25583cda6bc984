"""The ops in plain torch: the definition that the kernels are tested against, and the documentation of the mathematics.

Each op has a forward of the public signature, which autograd can differentiate, and a hand-derived backward `<op>_bwd`.
Loops run over sequences and time; nothing here is meant to be fast.
"""

from megalodon_ops.reference.adaptive_working_memory import adaptive_working_memory, adaptive_working_memory_bwd
from megalodon_ops.reference.bidirectional_cema import bidirectional_cema, bidirectional_cema_bwd
from megalodon_ops.reference.cema import cema, cema_bwd, cema_end_state, cema_end_state_bwd
from megalodon_ops.reference.cema_coefficients import cema_coefficients, cema_coefficients_bwd
from megalodon_ops.reference.chunked_attention import chunked_attention, chunked_attention_bwd
from megalodon_ops.reference.gated_silu import gated_silu, gated_silu_bwd
from megalodon_ops.reference.layer_norm import layer_norm, layer_norm_bwd, rms_norm
from megalodon_ops.reference.normalized_attention import normalized_attention, normalized_attention_bwd
from megalodon_ops.reference.normalized_qk import normalized_qk, normalized_qk_bwd
from megalodon_ops.reference.sequence_norm import sequence_norm, sequence_norm_bwd
from megalodon_ops.reference.timestep_norm import (
    timestep_norm,
    timestep_norm_bwd,
    timestep_norm_end_state,
    timestep_norm_end_state_bwd,
)

__all__ = [
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
    "rms_norm",
    "sequence_norm",
    "sequence_norm_bwd",
    "timestep_norm",
    "timestep_norm_bwd",
    "timestep_norm_end_state",
    "timestep_norm_end_state_bwd",
]
