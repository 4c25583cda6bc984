"""Bugs that tests once missed, most of which only show at large sizes; now one test finds each.

device.py compiles all of them into every build, turned off; test_cuda_known_bugs.py turns them on, one at a time.
"""

import re
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).parents[3] / "cuda"
CHANGE = re.compile(r"{{(.*?) => (.*?)}}")


@dataclass(frozen=True)
class Bug:
    """A change of a kernel file, written {{right => wrong}}; in `wrong`, "it" is the right expression."""

    file: str  # in cuda/
    code: str  # of the file, where it occurs once, with each change
    test: str  # that finds the bug: file and name

    @property
    def path(self) -> Path:
        (path,) = CUDA.rglob(self.file)
        return path

    @property
    def right(self) -> str:
        return CHANGE.sub(r"\1", self.code)

    def switchable(self, condition: str) -> str:
        """The code that is wrong if `condition` is true."""

        def choose(change: re.Match[str]) -> str:
            right, wrong = change.groups()
            wrong = re.sub(r"\bit\b", lambda _: right, wrong)
            return f"({condition} ? {wrong} : {right})"

        return CHANGE.sub(choose, self.code)


BUGS = {
    "powers-of-q-stop-at-32": Bug(
        "cema_scan.cuh", "int64_t length = 1; length < {{scan.tile => 32}};",
        "test_cuda_cema.py::test_sequences_against_longer_tiles[64-torch.float32]"),
    "dq-takes-ds-of-every-second-tile": Bug(
        "chunked_attention_bwd.cuh", "typed<T>(plan.tiles) + ((2 * (first_panel + {{at / kEdge => at / kEdge % 2}})",
        "test_cuda_chunked_attention_bwd.py::test_a_chunk_of_many_tiles_in_many_rounds[vectors-3]"),
    "dq-goes-on-from-the-wrong-buffer-in-16-bits": Bug(
        "chunked_attention_bwd.cuh", "key > 0 ? typed<R>({{round % 2 => round % 2 != (sizeof(T) == 2)}} ?",
        "test_cuda_chunked_attention_bwd.py::test_a_chunk_of_many_tiles_in_many_rounds[vectors-2]"),
    "decoding-merges-512-keys": Bug(
        "chunked_attention_step.cuh", "first < {{plan.tiles => 8}};",
        "test_cuda_chunked_attention.py::test_steps_over_many_and_over_long_tiles[None-torch.float32]"),
    "decoding-loses-keys-beyond-64-of-a-tile": Bug(
        "chunked_attention_step.cuh", "turn < turns && key < {{keys => keys > 64 ? 64 : it}};",
        "test_cuda_chunked_attention.py::test_steps_over_many_and_over_long_tiles[200-torch.float32]"),
    "dropkey-of-keys-48-to-63": Bug(
        "chunked_attention_mma.cuh", "column / 4 + {{n * 2 => n * 2 % 12}}, -kInfinity",
        "test_cuda_chunked_attention.py::test_every_tiling_matches_the_reference[128-columns-with-dropkey-0]"),
    "a-token-finds-1024-sequences": Bug(
        "sequences.cuh", "high = {{sequences.count => sequences.count > 1024 ? 1024 : it}};",
        "test_cuda_ops.py::test_more_sequences_than_1024[timestep_norm-True]"),
    "a-run-of-cema-finds-1024-sequences": Bug(
        "cema.cuh", "int high = {{count => count > 1024 ? 1024 : it}};",
        "test_cuda_ops.py::test_more_sequences_than_1024[cema-True]"),
    "a-block-of-rows-finds-1024-ranges": Bug(
        "chunked_attention.cuh", "high = {{sequences.count + 1 => sequences.count > 1023 ? 1024 : it}};",
        "test_cuda_ops.py::test_more_sequences_than_1024[chunked_attention-False]"),
    "a-block-of-the-backward-finds-1024-sequences": Bug(
        "chunked_attention_bwd_blocks.cuh", "high = {{sequences.count => sequences.count > 1024 ? 1024 : it}};",
        "test_cuda_ops.py::test_more_sequences_than_1024[chunked_attention-False]"),
    "alignment-of-the-cache-in-the-forward": Bug(
        "chunked_attention_fwd.cu", "p.v, {{p.cache_k => p.k}}, {{p.cache_v => p.v}},",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[chunked_attention-torch.bfloat16]"),
    "alignment-of-the-cache-in-the-backward": Bug(
        "chunked_attention_bwd.cu", "p.v, {{p.cache_k => p.k}}, {{p.cache_v => p.v}},",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[chunked_attention-torch.bfloat16]"),
    "alignment-of-the-cache-in-the-state": Bug(
        "chunked_attention_state.cu", "p.v, {{p.cache_k => p.k}}, {{p.cache_v => p.v}},",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[chunked_attention-torch.bfloat16]"),
    "alignment-of-y-in-cema": Bug(
        "cema_fwd.cu", "{params.x, {{params.y => params.x}}}",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[cema-torch.bfloat16]"),
    "alignment-of-dy-and-dx-in-cema": Bug(
        "cema_bwd.cu", "{params.x, {{params.dy => params.x}}, {{params.dx => params.x}}}",
        "test_cuda_ops.py::test_each_tensor_alone_may_be_misaligned[cema-torch.bfloat16]"),
    # Only the residual that is stored counts: in walk_rows, one that a first position loses is then the change at that
    # position.
    "the-residual-of-a-mean-from-count-0": Bug(
        "timestep_norm_fwd.cuh", "residual[0] = {{state.mean.lo => initial_count(p, s) == 0 ? 0 : it}};",
        "test_cuda_timestep_norm.py::test_a_state_of_count_0_keeps_the_residual_of_a_large_mean[0.0]"),
    "32-bit-offsets-in-the-local-scan-of-cema": Bug(
        "cema_scan.cuh", "{{scan.token(first) * scan.channels => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_cema_scans_offsets_beyond_31_bits[1]"),
    "32-bit-offsets-in-the-output-of-cema": Bug(
        "cema_scan.cuh", "int64_t at = {{scan.token(begin) * scan.channels => static_cast<int>(it)}} + place.channel;",
        "test_cuda_large_tensors.py::test_cema_scans_offsets_beyond_31_bits[1]"),
    "32-bit-offsets-in-the-gradients-of-cema": Bug(
        "cema_bwd.cuh", "at = {{t * scan.channels => static_cast<int>(it)}} + place.channel;",
        "test_cuda_large_tensors.py::test_cema_differentiates_at_offsets_beyond_31_bits[1]"),
    "32-bit-offsets-in-cema-of-few-tokens": Bug(
        "cema_step.cuh", "rows[{{(t + i) * p.channels => static_cast<int>(it)}}]",
        "test_cuda_large_tensors.py::test_cema_steps_at_offsets_beyond_31_bits"),
    "32-bit-offsets-of-the-ends-of-cema": Bug(
        "cema_ends.cuh", "{{scan.token(begin) * scan.channels => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_end_states_of_cema_at_offsets_beyond_31_bits"),
    "32-bit-offsets-of-end-states-gradients-in-timestep_norm": Bug(
        "timestep_norm_end_state_bwd.cuh", "{{(first + row) * p.channels => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_end_states_of_timestep_norm_at_offsets_beyond_31_bits"),
    "32-bit-offsets-of-rows-in-timestep_norm": Bug(
        "timestep_norm_fwd.cuh", "{{place.readable_token(r) * p.channels => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_timestep_norm_at_offsets_beyond_31_bits"),
    "32-bit-offsets-of-results-in-timestep_norm": Bug(
        "timestep_norm_fwd.cuh", "{{place.token(r) * p.channels => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_timestep_norm_at_offsets_beyond_31_bits"),
    "32-bit-offsets-of-sums-in-timestep_norm": Bug(
        "timestep_norm_bwd.cuh", "{{place.readable_token(r) * p.channels => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_timestep_norm_differentiates_at_offsets_beyond_31_bits"),
    "32-bit-offsets-of-gradients-in-timestep_norm": Bug(
        "timestep_norm_bwd.cuh", "{{(first + row) * p.channels => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_timestep_norm_differentiates_at_offsets_beyond_31_bits"),
    "a-third-slice-of-values-on-tensor-cores": Bug(
        "chunked_attention_mma.cuh", "static_cast<int>({{blockIdx.x % splits => blockIdx.x % splits > 1 ? 1 : it}})",
        "test_cuda_sizes.py::test_forward[three-slices-of-values]"),
    "a-third-slice-of-values-without-tensor-cores": Bug(
        "chunked_attention_fma.cuh", "first_column = {{blockIdx.x % splits => blockIdx.x % splits > 1 ? 1 : it}} *",
        "test_cuda_sizes.py::test_forward[double-256-thrice]"),
    "a-third-slice-of-values-in-decoding": Bug(
        "chunked_attention_step.cuh", "column = {{blockIdx.x % splits => blockIdx.x % splits > 1 ? 1 : it}} *",
        "test_cuda_sizes.py::test_steps[vectors]"),
    "512-columns-are-not-rescaled": Bug(
        "chunked_attention_fma.cuh", "output[i][c] *= {{factors[first_row + i] => kColumns > 256 ? R{1} : it}}",
        "test_cuda_sizes.py::test_forward[float-512-thrice]"),
    "a-ninth-panel-of-keys": Bug(
        "chunked_attention_bwd.cuh",
        "const int stop = {{end < seen ? static_cast<int>(end) : seen => seen > 8 * kEdge ? 8 * kEdge : it}};",
        "test_cuda_sizes.py::test_backward[nine-panels]"),
    "sums-of-dq-of-128-channels": Bug(
        "chunked_attention_bwd.cuh", "at = row * {{p.key_dim => p.key_dim > 128 ? 128 : it}} + channel;",
        "test_cuda_sizes.py::test_three_rounds_hand_on_wide_sums[vectors]"),
    "sums-of-dq-for-the-third-round": Bug(
        "chunked_attention_bwd.cuh", "typed<R>({{round % 2 => 0}} ? plan.dq_sums[0]",
        "test_cuda_sizes.py::test_three_rounds_hand_on_wide_sums[vectors]"),
    "dropkey-of-one-head-in-the-backward": Bug(
        "chunked_attention_bwd.cuh", "drop(p, {{block.head => 0}}, block.sequence)",
        "test_cuda_sizes.py::test_backward[dropkey-of-heads-and-tiles]"),
    "dropkey-of-one-tile-in-the-backward": Bug(
        "chunked_attention_bwd.cuh", "drop, block.start + query, block.start + {{key => key % kEdge}})",
        "test_cuda_sizes.py::test_backward[dropkey-of-heads-and-tiles]"),
    "gradients-of-padding-beyond-256-channels": Bug(
        "chunked_attention_bwd_prepare.cuh", "e < {{p.key_dim => p.key_dim > 256 ? 256 : it}};",
        "test_cuda_sizes.py::test_backward[padding]"),
    "a-row-of-a-state-has-128-units": Bug(
        "chunked_attention_state.cu", "u < {{copy.units => copy.units > 128 ? 128 : it}};",
        "test_cuda_sizes.py::test_rows_of_a_state_of_several_turns[torch.bfloat16-0-1032-2056]"),
    "a-ninth-block-of-channels-in-cema": Bug(
        "cema.cuh", "{{blockIdx.x % blocks => blockIdx.x % blocks > 7 ? 7 : it}} * blockDim.x",
        "test_cuda_sizes.py::test_cema_over_blocks_of_channels[2056-5]"),
    "a-third-tile-of-a-share-in-timestep_norm": Bug(
        "timestep_norm_bwd.cuh", "tile = first_tile + {{i => i > 1 ? 1 : it}},",
        "test_cuda_sizes.py::test_tiles_of_timestep_norm"),
    "heads-beyond-four-in-normalized_qk": Bug(
        "normalized_qk_fwd.cuh", "head = item % {{p.heads => p.heads > 4 ? 4 : it}},",
        "test_cuda_sizes.py::test_normalized_qk[heads]"),
    "16-bits-of-a-row-of-the-rotary-table": Bug(
        "normalized_qk.cuh",
        "{{(position + token - p.sequences.begin(s)) % p.chunk_size => static_cast<uint16_t>(position + token - p.sequences.begin(s))}};",
        "test_cuda_sizes.py::test_rows_of_the_rotary_table_beyond_16_bits"),
    "32-bit-offsets-of-tokens-in-attention": Bug(
        "chunked_attention.cuh",
        "{{((block.begin + origin - block.position) * p.heads + head) * width => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_attention_at_offsets_beyond_31_bits[torch.bfloat16]"),
    "32-bit-offsets-of-caches-in-attention": Bug(
        "chunked_attention.cuh",
        "{{((block.sequence * p.chunk_size + origin) * p.heads + head) * width => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_states_of_attention_at_offsets_beyond_31_bits[vectors-1]"),
    "32-bit-offsets-of-results-in-attention": Bug(
        "chunked_attention_mma.cuh",
        "{{((block.token + warp_row) * p.heads + head) * p.value_dim => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_attention_at_offsets_beyond_31_bits[torch.bfloat16]"),
    "32-bit-offsets-of-tokens-in-states-of-attention": Bug(
        "chunked_attention_state.cu", "{{(stop - fresh + row - kept) * copy.units => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_states_of_attention_at_offsets_beyond_31_bits[elements-256]"),
    "32-bit-offsets-of-rows-in-attention's-backward": Bug(
        "chunked_attention_bwd_blocks.cuh",
        "{{((block.token - block.cached) * p.heads + block.head) * width => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_attention_differentiates_at_offsets_beyond_31_bits"),
    "32-bit-offsets-of-tiles-in-attention's-backward": Bug(
        "chunked_attention_bwd.cuh", "{{(2 * panel + !values) * plan.blocks * kEdge * kEdge => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_attention_differentiates_at_offsets_beyond_31_bits"),
    "32-bit-offsets-in-normalized_qk": Bug(
        "normalized_qk_fwd.cuh", "{{(first + i) * p.heads * p.key_dim + channel => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_normalized_qk_at_offsets_beyond_31_bits[256]"),
    "32-bit-offsets-in-the-backward-of-normalized_qk": Bug(
        "normalized_qk_bwd.cuh", "{{((begin + token) * p.heads + head) * p.key_dim => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_normalized_qk_at_offsets_beyond_31_bits[256]"),
    "32-bit-offsets-of-sums-over-groups-of-modes": Bug(
        "cema_scan.cuh", "scan.sums.as<R>() + {{at => static_cast<int>(it)}}",
        "test_cuda_large_tensors.py::test_cema_scans_offsets_beyond_31_bits[33]"),
    "raw-offsets-in-blocks-of-rows": Bug(
        "chunked_attention.cuh", ": {{sequences.begin(r - 1) => sequences.spans[(r - 1) * sequences.stride]}};",
        "test_cuda_wrong_offsets.py::test_offsets_beyond_the_row_count_as_its_end[chunked_attention-75]"),
    # A term of a condition that chooses a kernel.
    "tensor-cores-for-whole-tiles-of-cut-rows": Bug(
        "cema_scan.cu", "{{sequences.row_length => sequences.tokens}} % kMmaTile == 0;",
        "test_cuda_cema_tensor.py::test_cases_that_take_the_scan[whole-tiles-of-cut-rows]"),
    "tensor-cores-beyond-the-grid": Bug(
        "cema_scan.cu", "{{tokens <= kMostBlocks * block_tokens => true}}",
        "test_cuda_large_tensors.py::test_cema_takes_the_scan_where_a_grid_would_be_too_large"),
    "steps-of-33-to-64-modes": Bug(
        "cema_fwd.cu", "p.modes <= {{kMostModes => 2 * kMostModes}}",
        "test_cuda_doors.py::test_a_term_that_is_false_chooses_another_kernel[cema]"),
    # Offsets, counters, words of a mask.
    "32-bit-offsets-of-outputs-on-tensor-cores": Bug(
        "cema_mma_parts.cuh",
        "gpu::st(tensor.as<gpu::bf16>() + {{t * scan.channels + channel => static_cast<int>(it)}}, eight)",
        "test_cuda_large_tensors.py::test_cema_outputs_on_tensor_cores_at_offsets_beyond_31_bits"),
    "a-count-in-32-bits": Bug(
        "timestep_norm.cuh", "return p.count ? {{p.count[s] => static_cast<int>(it)}} : 0;",
        "test_cuda_timestep_norm.py::test_counts_beyond_32_bits[5-4294967299]"),
    "a-count-of-a-tile-in-32-bits": Bug(
        "timestep_norm_fwd.cuh",
        "{{initial_count(p, s) + place.first + kTile - p.sequences.begin(s) => static_cast<int>(it)}};",
        "test_cuda_timestep_norm.py::test_counts_beyond_32_bits[137-4294967299]"),
    "32-bit-planes-of-statistics": Bug(
        "timestep_norm_fwd.cuh", "plane = {{p.sequences.tokens * p.groups => static_cast<int>(it)}};",
        "test_cuda_large_tensors.py::test_statistics_and_states_of_timestep_norm_at_offsets_beyond_31_bits[one-row]"),
    "32-bit-offsets-of-rstd": Bug(
        "timestep_norm_bwd.cuh", "[{{(2 * p.sequences.tokens + token) * p.groups + group => static_cast<int>(it)}}]",
        "test_cuda_large_tensors.py::test_statistics_and_states_of_timestep_norm_at_offsets_beyond_31_bits[one-row]"),
    "a-row-of-the-mask-in-16-bits": Bug(
        "chunked_attention.cuh", "word[1] = {{row => static_cast<uint16_t>(it)}};",
        "test_cuda_chunked_attention_dropkey.py::test_words_beyond_16_bits[far-rows-torch.bfloat16]"),
    "a-sequence-of-the-mask-in-16-bits": Bug(
        "chunked_attention.cuh", "word[3] = {{sequence_ => static_cast<uint16_t>(it)}};",
        "test_cuda_chunked_attention_dropkey.py::test_words_of_steps_beyond_16_bits[many-sequences]"),
    # One unit against another.
    "a-sequence-starts-in-the-second-group-of-tiles": Bug(
        "cema_mma.cuh", "scan.stops[tile] = {{tile => tile % kMmaTiles}} % tiles_of_row == 0;",
        "test_cuda_cema_tensor.py::test_gradients[starts-in-the-second-group]"),
    "the-residual-of-a-merged-pivot": Bug(
        "timestep_norm_fwd.cuh", "size > 0 ? {{widen(pivot) => pivot.hi}} + mean : 0;",
        "test_cuda_timestep_norm.py::test_a_large_mean_beside_a_small_deviation"),
    "the-maximum-of-a-dropped-span": Bug(
        "chunked_attention_step.cuh", "stats[0] = {{max => shift}}, stats[1] = sum;",
        "test_cuda_chunked_attention_dropkey.py::test_a_dropped_tile_has_no_maximum"),
    "the-maximum-of-a-span-without-keys": Bug(
        "chunked_attention_step.cuh", "stats[0] = {{-kInfinity<R> => 0}}, stats[1] = 0;",
        "test_cuda_chunked_attention_dropkey.py::test_a_dropped_tile_has_no_maximum"),
}  # fmt: skip


def with_known_bugs(file: str, text: str) -> str:
    """Add its bugs to the text of a kernel file, line for line. Bugs are numbered from 1, as in BUGS.

    Skips bugs whose code is not found exactly once; test_cuda_known_bugs.py reports those.
    """
    for number, bug in enumerate(BUGS.values(), start=1):
        if file == bug.file and text.count(bug.right) == 1:
            text = text.replace(bug.right, bug.switchable(f"(gpu_mutant == {number})"))
    return text
