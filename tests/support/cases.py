"""All ops that have a tests/ops/<room>/<op>_case.py, and the functions that build their cases."""

import importlib

from adaptive_working_memory.adaptive_working_memory_case import adaptive_working_memory_case
from case import Case, Op, Tensors, generator, randn, real_dtype, uniform
from cema.bidirectional_cema_case import bidirectional_cema_case
from cema.cema_case import cema_case
from cema.cema_end_state_case import cema_end_state_case
from chunked_attention.chunked_attention_case import chunked_attention_case
from normalized_attention.normalized_attention_case import normalized_attention_case
from normalized_qk.normalized_qk_case import normalized_qk_case
from paths import TESTS
from sequence_norm.sequence_norm_case import sequence_norm_case
from timestep_norm.timestep_norm_case import timestep_norm_case
from timestep_norm.timestep_norm_end_state_case import timestep_norm_end_state_case


def _declared() -> dict[str, Op]:
    paths = sorted(TESTS.glob("ops/*/*_case.py"))
    found = [importlib.import_module(f"{path.parent.name}.{path.stem}").OP for path in paths]
    return {op.name: op for op in found}


OPS = _declared()
BUILDERS = {name: op.case for name, op in OPS.items()}
WITH_STATE = {name: op.with_state for name, op in OPS.items() if op.with_state}
SMALL = {name: op.case(**op.with_state, **op.small) for name, op in OPS.items()}
"""A small call of each op, with a state"""
