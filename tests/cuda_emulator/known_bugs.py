"""Bugs that only real sizes show: each was planted by hand once, went unnoticed, and has a test now.

test_cuda_known_bugs.py plants them again. They are compiled all at once; `{on}` asks for the number of the bug that
runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cuda_emulator.mutants import SWITCH

CUDA = Path(__file__).parents[2] / "cuda"


@dataclass(frozen=True)
class Bug:
    file: str
    right: str  # which the file has once
    wrong: str
    test: tuple[str, ...]  # a file of tests, and words of the names of the tests that notice


_CEMA = ("test_cuda_cema.py",)
_BWD = ("test_cuda_chunked_attention_bwd.py", "many_rounds")
_STEPS = ("test_cuda_chunked_attention.py", "over_long_spans", "float32")
_MANY = ("test_cuda_ops.py", "more_sequences_than_1024")
_ALIGNED = ("test_cuda_ops.py", "alone_may_be_misaligned", "bfloat16")
_LARGE = ("test_cuda_large_tensors.py",)
_SIZES = ("test_cuda_sizes.py",)

BUGS = {
    "powers-of-q-stop-at-step-32": Bug(
        "cema/cema_scan.cuh", "int64_t length = 1; length < scan.tile;", "int64_t length = 1; length < ({on} ? 32 : scan.tile);",
        (*_CEMA, "longer_tiles[64", "float32"),
    ),
    "dq-takes-ds-of-every-second-tile": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "typed<T>(plan.tiles) + ((2 * (zero + at / kEdge)", "typed<T>(plan.tiles) + ((2 * (zero + ({on} ? at / kEdge % 2 : at / kEdge))",
        (*_BWD, "vectors-3"),
    ),
    "dq-goes-on-from-the-wrong-buffer-in-16-bits": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "key > 0 ? typed<R>(round % 2 ?", "key > 0 ? typed<R>((round % 2 != 0) != ({on} && sizeof(T) == 2) ?",
        (*_BWD, "vectors-2"),
    ),
    "decoding-merges-512-keys": Bug(
        "chunked_attention/chunked_attention_step.cuh", "first < plan.spans;", "first < ({on} ? 8 : plan.spans);", (*_STEPS, "None"),
    ),
    "decoding-loses-keys-beyond-64-of-a-span": Bug(
        "chunked_attention/chunked_attention_step.cuh", "turn < turns && key < keys;", "turn < turns && key < ({on} && keys > 64 ? 64 : keys);",
        (*_STEPS, "200"),
    ),
    "dropkey-of-keys-48-to-63": Bug(
        "chunked_attention/chunked_attention_mma.cuh", "column / 4 + n * 2, -kInfinity", "column / 4 + ({on} ? n * 2 % 12 : n * 2), -kInfinity",
        ("test_cuda_chunked_attention.py", "matches_the_reference", "128-columns-with-dropkey", "-0]"),
    ),
    "a-token-finds-1024-sequences": Bug(
        "common/sequences.cuh", "high = sequences.count;", "high = {on} && sequences.count > 1024 ? 1024 : sequences.count;",
        (*_MANY, "timestep_norm"),
    ),
    "a-run-of-cema-finds-1024-sequences": Bug(
        "cema/cema.cuh", "int high = count;", "int high = {on} && count > 1024 ? 1024 : count;", (*_MANY, "[cema"),
    ),
    "a-block-of-rows-finds-1024-ranges": Bug(
        "chunked_attention/chunked_attention.cuh", "high = sequences.count + 2;", "high = {on} && sequences.count > 1022 ? 1024 : sequences.count + 2;",
        (*_MANY, "chunked_attention"),
    ),
    "a-block-of-the-backward-finds-1024-sequences": Bug(
        "chunked_attention/chunked_attention_bwd_blocks.cuh", "high = sequences.count;", "high = {on} && sequences.count > 1024 ? 1024 : sequences.count;",
        (*_MANY, "chunked_attention"),
    ),
    "alignment-of-the-cache-in-the-forward": Bug(
        "chunked_attention/chunked_attention_fwd.cu", "p.v, p.cache_k, p.cache_v,", "p.v, {on} ? p.k : p.cache_k, {on} ? p.v : p.cache_v,",
        (*_ALIGNED, "chunked_attention"),
    ),
    "alignment-of-the-cache-in-the-backward": Bug(
        "chunked_attention/chunked_attention_bwd.cu", "p.v, p.cache_k, p.cache_v,", "p.v, {on} ? p.k : p.cache_k, {on} ? p.v : p.cache_v,",
        (*_ALIGNED, "chunked_attention"),
    ),
    "alignment-of-the-cache-in-the-state": Bug(
        "chunked_attention/chunked_attention_state.cu", "p.v, p.cache_k, p.cache_v,", "p.v, {on} ? p.k : p.cache_k, {on} ? p.v : p.cache_v,",
        (*_ALIGNED, "chunked_attention"),
    ),
    "alignment-of-y-in-cema": Bug(
        "cema/cema_fwd.cu", "{params.x, params.y}", "{params.x, {on} ? params.x : params.y}", (*_ALIGNED, "[cema"),
    ),
    "alignment-of-dy-and-dx-in-cema": Bug(
        "cema/cema_bwd.cu", "{params.x, params.dy, params.dx}", "{params.x, {on} ? params.x : params.dy, {on} ? params.x : params.dx}",
        (*_ALIGNED, "[cema"),
    ),
    # A first step's mean may lose its residual where walk_rows begins: the step's change, its difference from that
    # mean, is then the residual. Only what is stored counts.
    "the-residual-of-a-mean-from-count-0": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "residual[0] = state.mean.lo;", "residual[0] = {on} && initial_count(p, s) == 0 ? 0 : state.mean.lo;",
        ("test_cuda_timestep_norm.py", "a_state_of_count_0"),
    ),
    "32-bit-offsets-in-the-local-scan-of-cema": Bug(
        "cema/cema_scan.cuh", "scan.token(first) * scan.channels", "({on} ? static_cast<int>(scan.token(first) * scan.channels) : scan.token(first) * scan.channels)",
        (*_LARGE, "cema"),
    ),
    "32-bit-offsets-in-the-output-of-cema": Bug(
        "cema/cema_scan.cuh", "int64_t at = scan.token(begin) * scan.channels + place.channel;",
        "int64_t at = {on} ? static_cast<int>(scan.token(begin) * scan.channels) : scan.token(begin) * scan.channels; at += place.channel;",
        (*_LARGE, "cema"),
    ),
    "32-bit-offsets-in-the-gradients-of-cema": Bug(
        "cema/cema_bwd.cuh", "at = t * scan.channels + place.channel;", "at = {on} ? static_cast<int>(t * scan.channels) : t * scan.channels + place.channel;",
        (*_LARGE, "cema"),
    ),
    "32-bit-offsets-in-the-steps-of-cema": Bug(
        "cema/cema_step.cuh", "rows[(t + i) * p.channels]", "rows[{on} ? static_cast<int>((t + i) * p.channels) : (t + i) * p.channels]",
        (*_LARGE, "cema"),
    ),
    "32-bit-offsets-of-the-ends-of-cema": Bug(
        "cema/cema_ends.cuh", "scan.token(begin) * scan.channels", "({on} ? static_cast<int>(scan.token(begin) * scan.channels) : scan.token(begin) * scan.channels)",
        (*_LARGE, "end_states_of_cema"),
    ),
    "32-bit-offsets-of-end-states-gradients-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_end_state_bwd.cuh", "(first + row) * p.channels", "({on} ? static_cast<int>((first + row) * p.channels) : (first + row) * p.channels)",
        (*_LARGE, "end_states_of_timestep_norm"),
    ),
    "32-bit-offsets-of-rows-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "place.readable_token(r) * p.channels", "({on} ? static_cast<int>(place.readable_token(r) * p.channels) : place.readable_token(r) * p.channels)",
        (*_LARGE, "timestep_norm"),
    ),
    "32-bit-offsets-of-results-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "place.token(r) * p.channels", "({on} ? static_cast<int>(place.token(r) * p.channels) : place.token(r) * p.channels)",
        (*_LARGE, "timestep_norm"),
    ),
    "32-bit-offsets-of-sums-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_bwd.cuh", "place.readable_token(r) * p.channels", "({on} ? static_cast<int>(place.readable_token(r) * p.channels) : place.readable_token(r) * p.channels)",
        (*_LARGE, "timestep_norm"),
    ),
    "32-bit-offsets-of-gradients-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_bwd.cuh", "(first + row) * p.channels", "({on} ? static_cast<int>((first + row) * p.channels) : (first + row) * p.channels)",
        (*_LARGE, "timestep_norm"),
    ),
    "a-third-slice-of-values-on-tensor-cores": Bug(
        "chunked_attention/chunked_attention_mma.cuh", "static_cast<int>(blockIdx.x % splits)", "static_cast<int>({on} && blockIdx.x % splits > 1 ? 1 : blockIdx.x % splits)",
        (*_SIZES, "test_forward", "three-slices"),
    ),
    "a-third-slice-of-values-without-tensor-cores": Bug(
        "chunked_attention/chunked_attention_fma.cuh", "first_column = blockIdx.x % splits *", "first_column = ({on} && blockIdx.x % splits > 1 ? 1 : blockIdx.x % splits) *",
        (*_SIZES, "test_forward", "double-256"),
    ),
    "a-third-slice-of-values-in-decoding": Bug(
        "chunked_attention/chunked_attention_step.cuh", "column = blockIdx.x % splits *", "column = ({on} && blockIdx.x % splits > 1 ? 1 : blockIdx.x % splits) *",
        (*_SIZES, "test_steps", "vectors"),
    ),
    "512-columns-are-not-rescaled": Bug(
        "chunked_attention/chunked_attention_fma.cuh", "output[i][c] *= factors[first_row + i]", "output[i][c] *= {on} && kColumns > 256 ? R{1} : factors[first_row + i]",
        (*_SIZES, "test_forward", "float-512"),
    ),
    "a-ninth-panel-of-keys": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "const int stop = end < seen ?", "const int stop = {on} && seen > 8 * kEdge ? 8 * kEdge : end < seen ?",
        (*_SIZES, "test_backward", "nine-panels"),
    ),
    "sums-of-dq-of-128-channels": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "at = row * p.key_dim + channel;", "at = row * ({on} && p.key_dim > 128 ? 128 : p.key_dim) + channel;",
        (*_SIZES, "three_rounds", "vectors"),
    ),
    "sums-of-dq-for-the-third-round": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "typed<R>(round % 2 ? plan.dq_sums[0]", "typed<R>(round % 2 && !{on} ? plan.dq_sums[0]",
        (*_SIZES, "three_rounds", "vectors"),
    ),
    "dropkey-of-one-head-in-the-backward": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "drop(p, block.head, block.sequence)", "drop(p, {on} ? 0 : block.head, block.sequence)",
        (*_SIZES, "test_backward", "dropkey-of-heads"),
    ),
    "dropkey-of-one-tile-in-the-backward": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "drop, block.start + query, block.start + key)", "drop, block.start + query, block.start + ({on} ? key % kEdge : key))",
        (*_SIZES, "test_backward", "dropkey-of-heads"),
    ),
    "gradients-of-padding-beyond-256-channels": Bug(
        "chunked_attention/chunked_attention_bwd_prepare.cuh", "e < p.key_dim;", "e < ({on} && p.key_dim > 256 ? 256 : p.key_dim);",
        (*_SIZES, "test_backward", "padding]"),
    ),
    "a-row-of-a-state-has-128-units": Bug(
        "chunked_attention/chunked_attention_state.cu", "u < of.units;", "u < ({on} && of.units > 128 ? 128 : of.units);",
        (*_SIZES, "rows_of_a_state"),
    ),
    "a-ninth-block-of-channels-in-cema": Bug(
        "cema/cema.cuh", "blockIdx.x % blocks * blockDim.x", "({on} && blockIdx.x % blocks > 7 ? 7 : blockIdx.x % blocks) * blockDim.x",
        (*_SIZES, "cema_over_blocks", "2056"),
    ),
    "a-third-tile-of-a-share-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_bwd.cuh", "tile = first_tile + i,", "tile = first_tile + ({on} && i > 1 ? 1 : i),",
        (*_SIZES, "tiles_of_timestep_norm"),
    ),
    "heads-beyond-four-in-normalized_qk": Bug(
        "normalized_qk/normalized_qk_fwd.cuh", "head = item % p.heads,", "head = item % ({on} && p.heads > 4 ? 4 : p.heads),",
        (*_SIZES, "test_normalized_qk", "heads]"),
    ),
    "16-bits-of-a-row-of-the-rotary-table": Bug(
        "normalized_qk/normalized_qk.cuh", "position < 0 ? -1 : (position", "position < 0 ? -1 : {on} ? static_cast<uint16_t>(position + token - p.sequences.begin(s)) : (position",
        (*_SIZES, "rotary"),
    ),
    "32-bit-offsets-of-tokens-in-attention": Bug(
        "chunked_attention/chunked_attention.cuh", "((block.begin + origin - block.position) * p.heads + head) * width",
        "({on} ? static_cast<int>(((block.begin + origin - block.position) * p.heads + head) * width) : ((block.begin + origin - block.position) * p.heads + head) * width)",
        (*_LARGE, "attention_at"),
    ),
    "32-bit-offsets-of-caches-in-attention": Bug(
        "chunked_attention/chunked_attention.cuh", "((block.sequence * p.chunk_size + origin) * p.heads + head) * width",
        "({on} ? static_cast<int>(((block.sequence * p.chunk_size + origin) * p.heads + head) * width) : ((block.sequence * p.chunk_size + origin) * p.heads + head) * width)",
        (*_LARGE, "states_of_attention"),
    ),
    "32-bit-offsets-of-results-in-attention": Bug(
        "chunked_attention/chunked_attention_mma.cuh", "((block.token + warp_row) * p.heads + head) * p.value_dim",
        "({on} ? static_cast<int>(((block.token + warp_row) * p.heads + head) * p.value_dim) : ((block.token + warp_row) * p.heads + head) * p.value_dim)",
        (*_LARGE, "attention_at"),
    ),
    "32-bit-offsets-of-tokens-in-states-of-attention": Bug(
        "chunked_attention/chunked_attention_state.cu", "(stop - fresh + row - kept) * of.units",
        "({on} ? static_cast<int>((stop - fresh + row - kept) * of.units) : (stop - fresh + row - kept) * of.units)",
        (*_LARGE, "states_of_attention"),
    ),
    "32-bit-offsets-of-rows-in-attention's-backward": Bug(
        "chunked_attention/chunked_attention_bwd_blocks.cuh", "((block.token - block.cached) * p.heads + block.head) * width",
        "({on} ? static_cast<int>(((block.token - block.cached) * p.heads + block.head) * width) : ((block.token - block.cached) * p.heads + block.head) * width)",
        (*_LARGE, "attention_differentiates"),
    ),
    "32-bit-offsets-of-tiles-in-attention's-backward": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "(2 * panel + !values) * plan.blocks * kEdge * kEdge",
        "({on} ? static_cast<int>((2 * panel + !values) * plan.blocks * kEdge * kEdge) : (2 * panel + !values) * plan.blocks * kEdge * kEdge)",
        (*_LARGE, "attention_differentiates"),
    ),
    "32-bit-offsets-in-normalized_qk": Bug(
        "normalized_qk/normalized_qk_fwd.cuh", "(first + i) * p.heads * p.key_dim + channel",
        "({on} ? static_cast<int>((first + i) * p.heads * p.key_dim + channel) : (first + i) * p.heads * p.key_dim + channel)",
        (*_LARGE, "normalized_qk"),
    ),
    "32-bit-offsets-in-the-backward-of-normalized_qk": Bug(
        "normalized_qk/normalized_qk_bwd.cuh", "((begin + token) * p.heads + head) * p.key_dim",
        "({on} ? static_cast<int>(((begin + token) * p.heads + head) * p.key_dim) : ((begin + token) * p.heads + head) * p.key_dim)",
        (*_LARGE, "normalized_qk"),
    ),
    "32-bit-offsets-of-sums-over-groups-of-modes": Bug(
        "cema/cema_scan.cuh", "static_cast<R*>(scan.sums) + at",
        "static_cast<R*>(scan.sums) + ({on} ? static_cast<int>(at) : at)",
        (*_LARGE, "cema_scans"),
    ),
    "raw-offsets-in-blocks-of-rows": Bug(
        "chunked_attention/chunked_attention.cuh", ": sequences.begin(r - 1);", ": {on} ? sequences.cu_seqlens[r - 1] : sequences.begin(r - 1);",
        ("test_cuda_wrong_offsets.py", "inside_their_buffers", "chunked_attention"),
    ),
}  # fmt: skip


def planted(numbers: dict[str, int]) -> dict[str, str]:
    """The kernel files that have bugs, by name in cuda/, with all their bugs, each under its number."""
    texts: dict[str, str] = {}
    for name, number in numbers.items():
        bug = BUGS[name]
        text = texts.setdefault(bug.file, (CUDA / bug.file).read_text())
        found = text.count(bug.right)
        if found != 1:
            raise ValueError(f"{name}: {bug.file} has {bug.right!r} {found} times, not once")
        texts[bug.file] = text.replace(bug.right, bug.wrong.replace("{on}", f"(gpu_mutant == {number})"))
    return {file: " ".join(SWITCH.split()) + "\n" + text for file, text in texts.items()}
