"""Bugs that only show at large sizes: tests once missed each of them, and now one test finds it.

device.py compiles all of them into every build, turned off; test_cuda_known_bugs.py turns them on, one at a time.
`{on}` is true if the bug is on.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    file: str
    right: str  # occurs once in the file
    wrong: str
    test: str  # that finds the bug: file and name


BUGS = {
    "powers-of-q-stop-at-32": Bug(
        "cema/cema_scan.cuh", "int64_t length = 1; length < scan.tile;", "int64_t length = 1; length < ({on} ? 32 : scan.tile);",
        "test_cuda_cema.py::test_sequences_against_longer_tiles[64-torch.float32]",
    ),
    "dq-takes-ds-of-every-second-tile": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "typed<T>(plan.tiles) + ((2 * (first_panel + at / kEdge)", "typed<T>(plan.tiles) + ((2 * (first_panel + ({on} ? at / kEdge % 2 : at / kEdge))",
        "test_cuda_chunked_attention_bwd.py::test_a_chunk_of_many_tiles_in_many_rounds[vectors-3]",
    ),
    "dq-goes-on-from-the-wrong-buffer-in-16-bits": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "key > 0 ? typed<R>(round % 2 ?", "key > 0 ? typed<R>((round % 2 != 0) != ({on} && sizeof(T) == 2) ?",
        "test_cuda_chunked_attention_bwd.py::test_a_chunk_of_many_tiles_in_many_rounds[vectors-2]",
    ),
    "decoding-merges-512-keys": Bug(
        "chunked_attention/chunked_attention_step.cuh", "first < plan.tiles;", "first < ({on} ? 8 : plan.tiles);", "test_cuda_chunked_attention.py::test_steps_over_many_and_over_long_tiles[None-torch.float32]",
    ),
    "decoding-loses-keys-beyond-64-of-a-tile": Bug(
        "chunked_attention/chunked_attention_step.cuh", "turn < turns && key < keys;", "turn < turns && key < ({on} && keys > 64 ? 64 : keys);",
        "test_cuda_chunked_attention.py::test_steps_over_many_and_over_long_tiles[200-torch.float32]",
    ),
    "dropkey-of-keys-48-to-63": Bug(
        "chunked_attention/chunked_attention_mma.cuh", "column / 4 + n * 2, -kInfinity", "column / 4 + ({on} ? n * 2 % 12 : n * 2), -kInfinity",
        "test_cuda_chunked_attention.py::test_every_tiling_matches_the_reference[128-columns-with-dropkey-0]",
    ),
    "a-token-finds-1024-sequences": Bug(
        "common/sequences.cuh", "high = sequences.count;", "high = {on} && sequences.count > 1024 ? 1024 : sequences.count;",
        "test_cuda_ops.py::test_more_sequences_than_1024[timestep_norm-True]",
    ),
    "a-run-of-cema-finds-1024-sequences": Bug(
        "cema/cema.cuh", "int high = count;", "int high = {on} && count > 1024 ? 1024 : count;", "test_cuda_ops.py::test_more_sequences_than_1024[cema-True]",
    ),
    "a-block-of-rows-finds-1024-ranges": Bug(
        "chunked_attention/chunked_attention.cuh", "high = sequences.count + 1;", "high = {on} && sequences.count > 1023 ? 1024 : sequences.count + 1;",
        "test_cuda_ops.py::test_more_sequences_than_1024[chunked_attention-False]",
    ),
    "a-block-of-the-backward-finds-1024-sequences": Bug(
        "chunked_attention/chunked_attention_bwd_blocks.cuh", "high = sequences.count;", "high = {on} && sequences.count > 1024 ? 1024 : sequences.count;",
        "test_cuda_ops.py::test_more_sequences_than_1024[chunked_attention-False]",
    ),
    "alignment-of-the-cache-in-the-forward": Bug(
        "chunked_attention/chunked_attention_fwd.cu", "p.v, p.cache_k, p.cache_v,", "p.v, {on} ? p.k : p.cache_k, {on} ? p.v : p.cache_v,",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[chunked_attention-torch.bfloat16]",
    ),
    "alignment-of-the-cache-in-the-backward": Bug(
        "chunked_attention/chunked_attention_bwd.cu", "p.v, p.cache_k, p.cache_v,", "p.v, {on} ? p.k : p.cache_k, {on} ? p.v : p.cache_v,",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[chunked_attention-torch.bfloat16]",
    ),
    "alignment-of-the-cache-in-the-state": Bug(
        "chunked_attention/chunked_attention_state.cu", "p.v, p.cache_k, p.cache_v,", "p.v, {on} ? p.k : p.cache_k, {on} ? p.v : p.cache_v,",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[chunked_attention-torch.bfloat16]",
    ),
    "alignment-of-y-in-cema": Bug(
        "cema/cema_fwd.cu", "{params.x, params.y}", "{params.x, {on} ? params.x : params.y}", "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[cema-torch.bfloat16]",
    ),
    "alignment-of-dy-and-dx-in-cema": Bug(
        "cema/cema_bwd.cu", "{params.x, params.dy, params.dx}", "{params.x, {on} ? params.x : params.dy, {on} ? params.x : params.dx}",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[cema-torch.bfloat16]",
    ),
    # In walk_rows a first position's mean may lose its residual, which is then the change at this position. Only the
    # stored value counts.
    "the-residual-of-a-mean-from-count-0": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "residual[0] = state.mean.lo;", "residual[0] = {on} && initial_count(p, s) == 0 ? 0 : state.mean.lo;",
        "test_cuda_timestep_norm.py::test_a_state_of_count_0_keeps_the_residual_of_a_large_mean[0.0]",
    ),
    "32-bit-offsets-in-the-local-scan-of-cema": Bug(
        "cema/cema_scan.cuh", "scan.token(first) * scan.channels", "({on} ? static_cast<int>(scan.token(first) * scan.channels) : scan.token(first) * scan.channels)",
        "test_cuda_large_tensors.py::test_cema_scans_offsets_beyond_31_bits[1]",
    ),
    "32-bit-offsets-in-the-output-of-cema": Bug(
        "cema/cema_scan.cuh", "int64_t at = scan.token(begin) * scan.channels + place.channel;",
        "int64_t at = {on} ? static_cast<int>(scan.token(begin) * scan.channels) : scan.token(begin) * scan.channels; at += place.channel;",
        "test_cuda_large_tensors.py::test_cema_scans_offsets_beyond_31_bits[1]",
    ),
    "32-bit-offsets-in-the-gradients-of-cema": Bug(
        "cema/cema_bwd.cuh", "at = t * scan.channels + place.channel;", "at = ({on} ? static_cast<int>(t * scan.channels) : t * scan.channels) + place.channel;",
        "test_cuda_large_tensors.py::test_cema_differentiates_at_offsets_beyond_31_bits[1]",
    ),
    "32-bit-offsets-in-cema-of-few-tokens": Bug(
        "cema/cema_step.cuh", "rows[(t + i) * p.channels]", "rows[{on} ? static_cast<int>((t + i) * p.channels) : (t + i) * p.channels]",
        "test_cuda_large_tensors.py::test_cema_steps_at_offsets_beyond_31_bits",
    ),
    "32-bit-offsets-of-the-ends-of-cema": Bug(
        "cema/cema_ends.cuh", "scan.token(begin) * scan.channels", "({on} ? static_cast<int>(scan.token(begin) * scan.channels) : scan.token(begin) * scan.channels)",
        "test_cuda_large_tensors.py::test_end_states_of_cema_at_offsets_beyond_31_bits",
    ),
    "32-bit-offsets-of-end-states-gradients-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_end_state_bwd.cuh", "(first + row) * p.channels", "({on} ? static_cast<int>((first + row) * p.channels) : (first + row) * p.channels)",
        "test_cuda_large_tensors.py::test_end_states_of_timestep_norm_at_offsets_beyond_31_bits",
    ),
    "32-bit-offsets-of-rows-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "place.readable_token(r) * p.channels", "({on} ? static_cast<int>(place.readable_token(r) * p.channels) : place.readable_token(r) * p.channels)",
        "test_cuda_large_tensors.py::test_timestep_norm_at_offsets_beyond_31_bits",
    ),
    "32-bit-offsets-of-results-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "place.token(r) * p.channels", "({on} ? static_cast<int>(place.token(r) * p.channels) : place.token(r) * p.channels)",
        "test_cuda_large_tensors.py::test_timestep_norm_at_offsets_beyond_31_bits",
    ),
    "32-bit-offsets-of-sums-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_bwd.cuh", "place.readable_token(r) * p.channels", "({on} ? static_cast<int>(place.readable_token(r) * p.channels) : place.readable_token(r) * p.channels)",
        "test_cuda_large_tensors.py::test_timestep_norm_differentiates_at_offsets_beyond_31_bits",
    ),
    "32-bit-offsets-of-gradients-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_bwd.cuh", "(first + row) * p.channels", "({on} ? static_cast<int>((first + row) * p.channels) : (first + row) * p.channels)",
        "test_cuda_large_tensors.py::test_timestep_norm_differentiates_at_offsets_beyond_31_bits",
    ),
    "a-third-slice-of-values-on-tensor-cores": Bug(
        "chunked_attention/chunked_attention_mma.cuh", "static_cast<int>(blockIdx.x % splits)", "static_cast<int>({on} && blockIdx.x % splits > 1 ? 1 : blockIdx.x % splits)",
        "test_cuda_sizes.py::test_forward[three-slices-of-values]",
    ),
    "a-third-slice-of-values-without-tensor-cores": Bug(
        "chunked_attention/chunked_attention_fma.cuh", "first_column = blockIdx.x % splits *", "first_column = ({on} && blockIdx.x % splits > 1 ? 1 : blockIdx.x % splits) *",
        "test_cuda_sizes.py::test_forward[double-256-thrice]",
    ),
    "a-third-slice-of-values-in-decoding": Bug(
        "chunked_attention/chunked_attention_step.cuh", "column = blockIdx.x % splits *", "column = ({on} && blockIdx.x % splits > 1 ? 1 : blockIdx.x % splits) *",
        "test_cuda_sizes.py::test_steps[vectors]",
    ),
    "512-columns-are-not-rescaled": Bug(
        "chunked_attention/chunked_attention_fma.cuh", "output[i][c] *= factors[first_row + i]", "output[i][c] *= {on} && kColumns > 256 ? R{1} : factors[first_row + i]",
        "test_cuda_sizes.py::test_forward[float-512-thrice]",
    ),
    "a-ninth-panel-of-keys": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "const int stop = end < seen ?", "const int stop = {on} && seen > 8 * kEdge ? 8 * kEdge : end < seen ?",
        "test_cuda_sizes.py::test_backward[nine-panels]",
    ),
    "sums-of-dq-of-128-channels": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "at = row * p.key_dim + channel;", "at = row * ({on} && p.key_dim > 128 ? 128 : p.key_dim) + channel;",
        "test_cuda_sizes.py::test_three_rounds_hand_on_wide_sums[vectors]",
    ),
    "sums-of-dq-for-the-third-round": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "typed<R>(round % 2 ? plan.dq_sums[0]", "typed<R>(round % 2 && !{on} ? plan.dq_sums[0]",
        "test_cuda_sizes.py::test_three_rounds_hand_on_wide_sums[vectors]",
    ),
    "dropkey-of-one-head-in-the-backward": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "drop(p, block.head, block.sequence)", "drop(p, {on} ? 0 : block.head, block.sequence)",
        "test_cuda_sizes.py::test_backward[dropkey-of-heads-and-tiles]",
    ),
    "dropkey-of-one-tile-in-the-backward": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "drop, block.start + query, block.start + key)", "drop, block.start + query, block.start + ({on} ? key % kEdge : key))",
        "test_cuda_sizes.py::test_backward[dropkey-of-heads-and-tiles]",
    ),
    "gradients-of-padding-beyond-256-channels": Bug(
        "chunked_attention/chunked_attention_bwd_prepare.cuh", "e < p.key_dim;", "e < ({on} && p.key_dim > 256 ? 256 : p.key_dim);",
        "test_cuda_sizes.py::test_backward[padding]",
    ),
    "a-row-of-a-state-has-128-units": Bug(
        "chunked_attention/chunked_attention_state.cu", "u < copy.units;", "u < ({on} && copy.units > 128 ? 128 : copy.units);",
        "test_cuda_sizes.py::test_rows_of_a_state_of_several_turns[torch.bfloat16-0-1032-2056]",
    ),
    "a-ninth-block-of-channels-in-cema": Bug(
        "cema/cema.cuh", "blockIdx.x % blocks * blockDim.x", "({on} && blockIdx.x % blocks > 7 ? 7 : blockIdx.x % blocks) * blockDim.x",
        "test_cuda_sizes.py::test_cema_over_blocks_of_channels[2056-5]",
    ),
    "a-third-tile-of-a-share-in-timestep_norm": Bug(
        "timestep_norm/timestep_norm_bwd.cuh", "tile = first_tile + i,", "tile = first_tile + ({on} && i > 1 ? 1 : i),",
        "test_cuda_sizes.py::test_tiles_of_timestep_norm",
    ),
    "heads-beyond-four-in-normalized_qk": Bug(
        "normalized_qk/normalized_qk_fwd.cuh", "head = item % p.heads,", "head = item % ({on} && p.heads > 4 ? 4 : p.heads),",
        "test_cuda_sizes.py::test_normalized_qk[heads]",
    ),
    "16-bits-of-a-row-of-the-rotary-table": Bug(
        "normalized_qk/normalized_qk.cuh", "position < 0 ? -1 : (position", "position < 0 ? -1 : {on} ? static_cast<uint16_t>(position + token - p.sequences.begin(s)) : (position",
        "test_cuda_sizes.py::test_rows_of_the_rotary_table_beyond_16_bits",
    ),
    "32-bit-offsets-of-tokens-in-attention": Bug(
        "chunked_attention/chunked_attention.cuh", "((block.begin + origin - block.position) * p.heads + head) * width",
        "({on} ? static_cast<int>(((block.begin + origin - block.position) * p.heads + head) * width) : ((block.begin + origin - block.position) * p.heads + head) * width)",
        "test_cuda_large_tensors.py::test_attention_at_offsets_beyond_31_bits[torch.bfloat16]",
    ),
    "32-bit-offsets-of-caches-in-attention": Bug(
        "chunked_attention/chunked_attention.cuh", "((block.sequence * p.chunk_size + origin) * p.heads + head) * width",
        "({on} ? static_cast<int>(((block.sequence * p.chunk_size + origin) * p.heads + head) * width) : ((block.sequence * p.chunk_size + origin) * p.heads + head) * width)",
        "test_cuda_large_tensors.py::test_states_of_attention_at_offsets_beyond_31_bits[vectors-1]",
    ),
    "32-bit-offsets-of-results-in-attention": Bug(
        "chunked_attention/chunked_attention_mma.cuh", "((block.token + warp_row) * p.heads + head) * p.value_dim",
        "({on} ? static_cast<int>(((block.token + warp_row) * p.heads + head) * p.value_dim) : ((block.token + warp_row) * p.heads + head) * p.value_dim)",
        "test_cuda_large_tensors.py::test_attention_at_offsets_beyond_31_bits[torch.bfloat16]",
    ),
    "32-bit-offsets-of-tokens-in-states-of-attention": Bug(
        "chunked_attention/chunked_attention_state.cu", "(stop - fresh + row - kept) * copy.units",
        "({on} ? static_cast<int>((stop - fresh + row - kept) * copy.units) : (stop - fresh + row - kept) * copy.units)",
        "test_cuda_large_tensors.py::test_states_of_attention_at_offsets_beyond_31_bits[elements-256]",
    ),
    "32-bit-offsets-of-rows-in-attention's-backward": Bug(
        "chunked_attention/chunked_attention_bwd_blocks.cuh", "((block.token - block.cached) * p.heads + block.head) * width",
        "({on} ? static_cast<int>(((block.token - block.cached) * p.heads + block.head) * width) : ((block.token - block.cached) * p.heads + block.head) * width)",
        "test_cuda_large_tensors.py::test_attention_differentiates_at_offsets_beyond_31_bits",
    ),
    "32-bit-offsets-of-tiles-in-attention's-backward": Bug(
        "chunked_attention/chunked_attention_bwd.cuh", "(2 * panel + !values) * plan.blocks * kEdge * kEdge",
        "({on} ? static_cast<int>((2 * panel + !values) * plan.blocks * kEdge * kEdge) : (2 * panel + !values) * plan.blocks * kEdge * kEdge)",
        "test_cuda_large_tensors.py::test_attention_differentiates_at_offsets_beyond_31_bits",
    ),
    "32-bit-offsets-in-normalized_qk": Bug(
        "normalized_qk/normalized_qk_fwd.cuh", "(first + i) * p.heads * p.key_dim + channel",
        "({on} ? static_cast<int>((first + i) * p.heads * p.key_dim + channel) : (first + i) * p.heads * p.key_dim + channel)",
        "test_cuda_large_tensors.py::test_normalized_qk_at_offsets_beyond_31_bits[256]",
    ),
    "32-bit-offsets-in-the-backward-of-normalized_qk": Bug(
        "normalized_qk/normalized_qk_bwd.cuh", "((begin + token) * p.heads + head) * p.key_dim",
        "({on} ? static_cast<int>(((begin + token) * p.heads + head) * p.key_dim) : ((begin + token) * p.heads + head) * p.key_dim)",
        "test_cuda_large_tensors.py::test_normalized_qk_at_offsets_beyond_31_bits[256]",
    ),
    "32-bit-offsets-of-sums-over-groups-of-modes": Bug(
        "cema/cema_scan.cuh", "scan.sums.as<R>() + at",
        "scan.sums.as<R>() + ({on} ? static_cast<int>(at) : at)",
        "test_cuda_large_tensors.py::test_cema_scans_offsets_beyond_31_bits[33]",
    ),
    "raw-offsets-in-blocks-of-rows": Bug(
        "chunked_attention/chunked_attention.cuh", ": sequences.begin(r - 1);", ": {on} ? sequences.spans[(r - 1) * sequences.stride] : sequences.begin(r - 1);",
        "test_cuda_wrong_offsets.py::test_offsets_beyond_the_row_count_as_its_end[chunked_attention-75]",
    ),
    # Doors: a term of a condition that chooses a kernel.
    "tensor-cores-for-whole-tiles-of-cut-rows": Bug(
        "cema/cema_scan.cu", "sequences.row_length % kMmaTile == 0;", "({on} ? sequences.tokens : sequences.row_length) % kMmaTile == 0;",
        "test_cuda_cema_tensor.py::test_cases_that_take_the_scan[whole-tiles-of-cut-rows]",
    ),
    "tensor-cores-beyond-the-grid": Bug(
        "cema/cema_scan.cu", "tokens <= kMostBlocks * block_tokens", "({on} || tokens <= kMostBlocks * block_tokens)",
        "test_cuda_large_tensors.py::test_cema_takes_the_scan_where_a_grid_would_be_too_large",
    ),
    "steps-of-33-to-64-modes": Bug(
        "cema/cema_fwd.cu", "p.modes <= kMostModes", "p.modes <= ({on} ? 2 * kMostModes : kMostModes)",
        "test_cuda_doors.py::test_a_term_that_is_false_chooses_another_kernel[cema]",
    ),
    # Offsets, counters, words of a mask.
    "32-bit-offsets-of-outputs-on-tensor-cores": Bug(
        "cema/cema_mma_parts.cuh", "gpu::st(tensor.as<gpu::bf16>() + t * scan.channels + channel, eight)",
        "gpu::st(tensor.as<gpu::bf16>() + ({on} ? static_cast<int>(t * scan.channels + channel) : t * scan.channels + channel), eight)",
        "test_cuda_large_tensors.py::test_cema_outputs_on_tensor_cores_at_offsets_beyond_31_bits",
    ),
    "a-count-in-32-bits": Bug(
        "timestep_norm/timestep_norm.cuh", "return p.count ? p.count[s] : 0;", "return p.count ? ({on} ? static_cast<int>(p.count[s]) : p.count[s]) : 0;",
        "test_cuda_timestep_norm.py::test_counts_beyond_32_bits[5-4294967299]",
    ),
    "a-count-of-a-tile-in-32-bits": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "initial_count(p, s) + place.first + kTile - p.sequences.begin(s);",
        "{on} ? static_cast<int>(initial_count(p, s) + place.first + kTile - p.sequences.begin(s)) : initial_count(p, s) + place.first + kTile - p.sequences.begin(s);",
        "test_cuda_timestep_norm.py::test_counts_beyond_32_bits[137-4294967299]",
    ),
    "32-bit-planes-of-statistics": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "plane = p.sequences.tokens * p.groups;",
        "plane = {on} ? static_cast<int>(p.sequences.tokens * p.groups) : p.sequences.tokens * p.groups;",
        "test_cuda_large_tensors.py::test_statistics_and_states_of_timestep_norm_at_offsets_beyond_31_bits[one-row]",
    ),
    "32-bit-offsets-of-rstd": Bug(
        "timestep_norm/timestep_norm_bwd.cuh", "[(2 * p.sequences.tokens + token) * p.groups + group]",
        "[{on} ? static_cast<int>((2 * p.sequences.tokens + token) * p.groups + group) : (2 * p.sequences.tokens + token) * p.groups + group]",
        "test_cuda_large_tensors.py::test_statistics_and_states_of_timestep_norm_at_offsets_beyond_31_bits[one-row]",
    ),
    "a-row-of-the-mask-in-16-bits": Bug(
        "chunked_attention/chunked_attention.cuh", "word[1] = row;", "word[1] = {on} ? static_cast<uint16_t>(row) : row;",
        "test_cuda_chunked_attention_dropkey.py::test_words_beyond_16_bits[far-rows-torch.bfloat16]",
    ),
    "a-sequence-of-the-mask-in-16-bits": Bug(
        "chunked_attention/chunked_attention.cuh", "word[3] = sequence_;", "word[3] = {on} ? static_cast<uint16_t>(sequence_) : sequence_;",
        "test_cuda_chunked_attention_dropkey.py::test_words_of_steps_beyond_16_bits[many-sequences]",
    ),
    # One unit against another.
    "a-sequence-starts-in-the-second-group-of-tiles": Bug(
        "cema/cema_mma.cuh", "scan.stops[tile] = tile % tiles_of_row == 0;", "scan.stops[tile] = ({on} ? tile % kMmaTiles : tile) % tiles_of_row == 0;",
        "test_cuda_cema_tensor.py::test_gradients[starts-in-the-second-group]",
    ),
    "the-residual-of-a-merged-pivot": Bug(
        "timestep_norm/timestep_norm_fwd.cuh", "size > 0 ? widen(pivot) + mean : 0;", "size > 0 ? ({on} ? pivot.hi : widen(pivot)) + mean : 0;",
        "test_cuda_timestep_norm.py::test_a_large_mean_beside_a_small_deviation",
    ),
    "the-maximum-of-a-dropped-span": Bug(
        "chunked_attention/chunked_attention_step.cuh", "stats[0] = max, stats[1] = sum;", "stats[0] = {on} ? shift : max, stats[1] = sum;",
        "test_cuda_chunked_attention_dropkey.py::test_a_dropped_tile_has_no_maximum",
    ),
    "the-maximum-of-a-span-without-keys": Bug(
        "chunked_attention/chunked_attention_step.cuh", "stats[0] = -kInfinity<R>, stats[1] = 0;", "stats[0] = {on} ? R{0} : -kInfinity<R>, stats[1] = 0;",
        "test_cuda_chunked_attention_dropkey.py::test_a_dropped_tile_has_no_maximum",
    ),
}  # fmt: skip


def with_known_bugs(file: str, text: str) -> str:
    """Add its bugs to the text of a kernel file, line for line. Numbers of bugs are places in BUGS, from 1.

    Skips bugs whose `right` is not found once, which test_cuda_known_bugs.py reports.
    """
    for number, bug in enumerate(BUGS.values(), start=1):
        if file == bug.file and text.count(bug.right) == 1:
            text = text.replace(bug.right, bug.wrong.replace("{on}", f"(gpu_mutant == {number})"))
    return text
