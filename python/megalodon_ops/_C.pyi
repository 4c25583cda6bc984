"""Types of the compiled module. The kernel entry points take contiguous CPU tensors and check them; outputs are written in place."""

from collections.abc import Callable

from torch import Tensor

def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
def built_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def num_threads() -> int: ...
def build_info() -> dict[str, str]: ...
def cema_fwd(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    state_out: Tensor | None,
    /,
) -> None: ...
def cema_bwd(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dy: Tensor,
    dstate_out: Tensor | None,
    dx: Tensor,
    dp: Tensor,
    dq: Tensor,
    dgamma: Tensor,
    domega: Tensor,
    dstate: Tensor | None,
    /,
) -> None: ...
def cema_end_state_fwd(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    state_out: Tensor,
    /,
) -> None: ...
def cema_end_state_bwd(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dstate_out: Tensor,
    dx: Tensor,
    dp: Tensor,
    dq: Tensor,
    /,
) -> None: ...
def timestep_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    count: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    count_out: Tensor | None,
    mean_out: Tensor | None,
    var_out: Tensor | None,
    residual_out: Tensor | None,
    /,
) -> None: ...
def timestep_norm_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    count: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    stats: Tensor,
    dy: Tensor,
    dmean_out: Tensor | None,
    dvar_out: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    /,
) -> None: ...
def timestep_norm_end_state_fwd(
    x: Tensor,
    num_groups: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    mean_out: Tensor,
    var_out: Tensor,
    residual_out: Tensor,
    count_out: Tensor,
    /,
) -> None: ...
def timestep_norm_end_state_bwd(
    x: Tensor,
    num_groups: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    mean_out: Tensor,
    residual_out: Tensor,
    dmean_out: Tensor | None,
    dvar_out: Tensor | None,
    dx: Tensor,
    /,
) -> None: ...
def normalized_qk_fwd(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    num_heads: int,
    chunk_size: int,
    eps: float,
    rotary: Tensor,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    q: Tensor,
    k: Tensor,
    /,
) -> None: ...
def normalized_qk_bwd(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    num_heads: int,
    chunk_size: int,
    eps: float,
    rotary: Tensor,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dz: Tensor,
    dgamma: Tensor,
    dbeta: Tensor,
    /,
) -> None: ...
def chunked_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    position: Tensor | None,
    chunk_size: int,
    causal: bool,
    scale: float,
    dropkey: float,
    dropkey_seed: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    /,
) -> None: ...
def chunked_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    position: Tensor | None,
    chunk_size: int,
    causal: bool,
    scale: float,
    dropkey: float,
    dropkey_seed: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    /,
) -> None: ...
def chunked_attention_state(
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    position: Tensor | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    cache_k_out: Tensor,
    cache_v_out: Tensor,
    position_out: Tensor,
    /,
) -> None: ...
def linear_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, /) -> None: ...
def linear_many_rows(
    x: Tensor, x_transposed: bool, weight: Tensor, weight_transposed: bool, bias: Tensor | None, y: Tensor, add: bool, /
) -> None: ...
def transpose(x: Tensor, y: Tensor, /) -> None: ...
def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, is_rms_norm: bool, y: Tensor, /
) -> None: ...
def layer_norm_bwd(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    dy: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    /,
) -> None: ...
def working_memory_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    position: Tensor,
    chunk_size: int,
    visible: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    memory: Tensor,
    mass: Tensor,
    o: Tensor,
    /,
) -> None: ...
def gated_silu_fwd(x: Tensor, value: Tensor | None, y: Tensor, /) -> None: ...
def gated_silu_bwd(x: Tensor, value: Tensor | None, dy: Tensor, dx: Tensor, dvalue: Tensor | None, /) -> None: ...
def cross_entropy(logits: Tensor, targets: Tensor, scales: Tensor | None, losses: Tensor, /) -> None: ...
def cema_coefficients_fwd(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, p: Tensor, q: Tensor, scaled: Tensor, /
) -> None: ...
def cema_coefficients_bwd(
    dp: Tensor,
    dq: Tensor,
    dscaled: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    dalpha: Tensor,
    ddelta: Tensor,
    dtheta: Tensor,
    dgamma: Tensor,
    /,
) -> None: ...

class Decoder:
    def __init__(
        self,
        config: object,
        tensors: dict[str, Tensor | Callable[[memoryview, memoryview], None]],
        rotary: Tensor,
        like: Tensor,
        batch: int,
        max_tokens: int,
    ) -> None: ...
    def run(self, tokens: Tensor, logits: Tensor, table: Tensor | None, /) -> None: ...
