"""Memory, operations and exchanged bytes of a training step; docs/plan.md has the accuracy of each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..model.config import MegalodonConfig, check_config
from ..public_models import Megalodon
from ..ops.common.checks import check_size, short_text
from ..ops.linear_cross_entropy import linear_cross_entropy as loss
from .measure import measure
from .mesh import DIMENSIONS
from .tensor import check_can_split


@dataclass(frozen=True)
class Plan:
    """Costs of a training step on a mesh, as :func:`plan` predicts them.

    `tokens` counts the tokens of all `devices`; the other fields are for one device.

        memory       bytes by kind, at the peak of their sum
        bytes        this sum
        operations   operations by kind, counted as by `torch.utils.flop_counter`
        exchange     received bytes by kind: S (n - 1) / n for an all-gather to S bytes over n devices
    """

    config: MegalodonConfig
    mesh: dict[str, int]
    devices: int
    tokens: int
    memory: dict[str, int]
    bytes: int
    operations: dict[str, int]
    exchange: dict[str, int]


def plan(
    config: MegalodonConfig,
    mesh: Mapping[str, int],
    *,
    context: int,
    batch: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    autocast: bool = False,
    param_dtype: torch.dtype = torch.float32,
    data: str = "shard",
) -> Plan:
    """Predict the memory, the operations and the exchanged bytes of a training step with AdamW.

    Args:
        config: the model; with `layerwise_ckpt`, each block is recomputed in the backward.
        mesh: number of devices of `data`, `chunk` and `tensor`, such as {"data": 128, "chunk": 2}.
        context: tokens of a sequence. The size of `chunk` must divide its number of chunks.
        batch: sequences of a step on all devices; None: one for each `data` device.
        device: "cpu" or "cuda"; the two save different tensors and compute different operations.
        dtype: dtype of matrix products and activations; with a 16-bit dtype, CEMA, norms and states stay float32.
        autocast: float32 parameters and residual stream, products in `dtype`, as with torch.autocast.
        param_dtype: dtype in which matrices, their gradients and Adam's moments are stored. If it is not `dtype`, and
            without `autocast`, a block's matrices are cast when they are gathered, as `parallelize(param_dtype=)` does.
        data: "shard" or "replicate": a device keeps its shards of the parameters, or all of them.

    Raises:
        ValueError: the mesh does not divide the model, the batch or the context, or an argument has a wrong value.
        TypeError: the configuration is an encoder's, whose activations differ.

    Example:
        >>> import megalodon_ops as mo
        >>> from megalodon_ops.distributed.plan import plan
        >>> plan(mo.MegalodonConfig.preset("mega1.3B"), {"data": 8}, context=8192, device="cuda").exchange
        {'parameters, all-gather': 4713347072, 'gradients, reduce-scatter': 4700430336}
    """
    check_config("plan", config)
    if unknown := [name for name in mesh if name not in DIMENSIONS]:
        raise ValueError(
            f"plan: `mesh` must have dimensions named data, chunk or tensor, got {short_text(unknown[0])}."
        )
    sizes = {name: check_size("plan", "mesh", mesh.get(name, 1)) for name in DIMENSIONS}
    data_size, chunk, tensor = sizes.values()
    context = check_size("plan", "context", context)
    batch = data_size if batch is None else check_size("plan", "batch", batch)
    for name, value, choices in (("device", device, ("cpu", "cuda")), ("data", data, ("shard", "replicate"))):
        if value not in choices:
            raise ValueError(f'plan: `{name}` must be "{choices[0]}" or "{choices[1]}", got {short_text(value)}.')
    if param_dtype != torch.float32 and (autocast or dtype != param_dtype):
        raise ValueError(f"plan: `param_dtype` must be float32, or `dtype` without autocast, got {param_dtype}.")
    if batch % data_size:
        raise ValueError(f"plan: `batch` must be a multiple of the mesh's data = {data_size}, got {batch}.")
    if chunk > 1 and context % (chunk * config.chunk_size):
        expected = f"a multiple of the mesh's chunk = {chunk} times the chunk size {config.chunk_size}"
        raise ValueError(f"plan: `context` must be {expected}, got {context}.")
    check_can_split("plan", config, tensor)

    stream = torch.float32 if autocast else dtype  # dtype of the residual stream
    layers, recompute = config.num_layers, config.layerwise_ckpt
    rows, length = batch // data_size, context // chunk  # of a device
    options = dict(dtype=dtype, autocast=autocast, on_cpu=device == "cpu", recompute=recompute)
    block, final = measure(config, rows, length, tensor, **options)
    operations = {kind: layers * count + final.operations.get(kind, 0) for kind, count in block.operations.items()}

    # Parameters. Gathered: those outside the blocks, this block, the next one, and one block's gradients.
    group = data_size * chunk
    shards = group if data == "shard" else 1
    stored_block, stored_others = _parameter_bytes(config, param_dtype, shards, tensor)
    used_block, used_others = _parameter_bytes(config, stream, shards, tensor)
    stored, used = layers * stored_block + stored_others, layers * used_block + used_others
    gathered = 0
    if shards > 1 or stored != used:
        gathered = shards * (used_others + min(2, layers) * used_block + used_block + stored_block)

    # Activations and gradients, at the peak of their sum.
    channels = rows * length * config.model_dim * stream.itemsize
    products = rows * length * config.model_dim * dtype.itemsize
    saved, saved_by_final = sum(block.saved), sum(final.saved)
    scratch = max(block.saved) + 2 * channels
    saved_before = channels // tensor if recompute else saved  # bytes of a block until its backward
    logits = min(rows * length * config.num_outputs // tensor, loss._block(torch.device(device)))
    activations, gradients, scratch = max(
        (layers * saved_before + saved_by_final, 0, logits * (dtype.itemsize + 4)),  # the loss
        ((layers - 1) * saved_before + saved, stored_block + stored_others, scratch),  # the backward of the last block
        (saved, stored, scratch),  # the backward of the first block, which comes last
        key=sum,
    )
    memory = {
        "parameters": stored,
        "Adam's moments": 2 * stored,
        "gradients": gradients,
        "gathered parameters, whole gradients": gathered,
        "activations": activations,
        "scratch memory": scratch,
    }

    # Bytes gathered or reduced, and by how many devices; see docs/chunk-parallel.md and tensor-parallel.md.
    norm, cema = 2 * config.norm_num_groups * 8, 2 * config.model_dim * config.cema_ndim * 4  # bytes of a row's states
    widths = config.z_dim + config.value_dim
    states = norm + cema + config.working_memory * config.z_dim * (1 + widths // config.num_heads) * 4
    chunk_bytes = rows * config.chunk_size * (1 + config.working_memory) * widths * dtype.itemsize
    output = channels + config.num_outputs * config.model_dim * stream.itemsize
    gathers = 3 * (1 + recompute) * channels + 2 * products
    scatters = 3 * channels + (2 + recompute * (1 + config.rescale_nffn)) * products  # fc2's output again, for its gain
    exchanged = {
        "parameters, all-gather": (2 * shards * used, shards),
        "gradients, reduce-scatter": (shards * stored, shards),
        "gradients, all-reduce": (2 * stored, group // shards),
        "states, forward": (chunk * rows * ((1 + recompute) * layers * states + norm) // tensor, chunk),
        "states, backward": (chunk * rows * (layers * states + norm) // tensor, chunk),
        "keys and values, handed on": ((config.visible_chunks - 1) * (2 + recompute) * layers * chunk_bytes, chunk),
        "channels and output matrix, all-gather": (layers * gathers + output, tensor),
        "channels and output matrix, reduce-scatter": (layers * scatters + output, tensor),
    }
    exchange = {kind: total * (n - 1) // n for kind, (total, n) in exchanged.items() if total and n > 1}
    totals = dict(devices=group * tensor, tokens=batch * context, bytes=sum(memory.values()))
    return Plan(config, sizes, memory=memory, operations=operations, exchange=exchange, **totals)


def _parameter_bytes(config: MegalodonConfig, dtype: torch.dtype, shards: int, tensor: int) -> tuple[int, int]:
    """Bytes of a device's shards of a block, and of the other parameters; FSDP2 pads along the first dimension."""
    with torch.device("meta"):
        model = Megalodon(replace(config, num_layers=1)).to(dtype)
    sizes = {name: math.ceil(len(p) / shards) * p[0].nbytes // tensor for name, p in model.named_parameters()}
    block = sum(size for name, size in sizes.items() if name.startswith("layers."))
    return block, sum(sizes.values()) - block
