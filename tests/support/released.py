"""Folders as the released code writes them."""

import json

import torch


def save_released(model, directory, shards=1, **config):
    """Write the files of the released code, including the buffers that loading drops.

    A shard has a slice of each parameter: along dimension 1 for `dim_1`, else along 0; those in `whole` are not split.
    """
    weights = {**model.state_dict(), "rope.freqs": torch.zeros(4), "output.final_norm.prior_count": torch.tensor(0)}
    dim_1 = ("embed.weight", "mega.gamma", "mega.beta", "wh2.weight", "fc2.weight", "output.output.weight")
    whole = ("rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias", "rope.freqs", "prior_count", "nffn.alpha")
    for rank in range(shards):
        part = {}
        for name, value in weights.items():
            dim = None if name.endswith(whole) else 1 if name.endswith(dim_1) else 0
            part[name] = value if dim is None else value.chunk(shards, dim)[rank].clone()
        torch.save(part, directory / ("consolidated.pth" if shards == 1 else f"consolidated.{rank:02d}.pth"))
    (directory / "config.json").write_text(json.dumps({"model": {**model.config.to_dict(), **config}, "tokenizer": {}}))
    (directory / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": shards, "dtype": "fp32"}))
