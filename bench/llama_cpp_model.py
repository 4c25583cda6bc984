"""A Llama of plain_models.py in llama.cpp (`pip install llama-cpp-python gguf`), from a file that gguf writes.

Every matrix has the file's type, the norms are F32. llama.cpp keeps keys and values in float16.
"""

import ctypes
import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .plain_models import Llama

INSTALLED = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
TYPES = ("Q8_0", "Q4_0", "BF16", "F32")


class LlamaCpp:
    """The weights of `llama` in llama.cpp, rounded to one of TYPES, and room for `context` tokens."""

    def __init__(self, llama: Llama, kind: str, context: int) -> None:
        import llama_cpp

        with tempfile.TemporaryDirectory() as folder:  # the model keeps its mapping of the file
            path = Path(folder) / "model.gguf"
            _write(llama, kind, context, path)
            self.model = llama_cpp.Llama(str(path), n_ctx=context, flash_attn=True, verbose=False)
        self.library = llama_cpp
        self.num_logits = llama.output.out_features

    def read(self, tokens: Tensor, past: int) -> Tensor:
        """Logits (1, 1, vocab) of the last of the tokens (1, L) after the first `past` tokens read before."""
        self.model.n_tokens = past
        threads = torch.get_num_threads()
        self.library.llama_set_n_threads(self.model.ctx, threads, threads)
        self.model.eval(tokens[0].tolist())
        first = self.library.llama_get_logits(self.model.ctx).contents
        logits = (ctypes.c_float * self.num_logits).from_address(ctypes.addressof(first))
        return torch.tensor(logits)[None, None]


def _write(llama: Llama, kind: str, context: int, path: Path) -> None:
    import gguf

    layers = llama.layers
    vocab, dim = llama.embed.weight.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(vocab)
    writer.add_context_length(-(-context // 256) * 256)  # as llama.cpp rounds it
    writer.add_embedding_length(dim)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(layers[0].down.in_features)
    writer.add_head_count(dim // llama.head_dim)
    writer.add_rope_dimension_count(llama.head_dim)
    writer.add_layer_norm_rms_eps(torch.finfo(torch.float32).eps)
    weights = {"token_embd": llama.embed.weight, "output_norm": llama.norm.weight, "output": llama.output.weight}
    for i, layer in enumerate(layers):
        q, k, v = layer.qkv.weight.chunk(3)
        gate, up = layer.gate_up.weight.chunk(2)
        own = dict(attn_norm=layer.norm1.weight, attn_q=_neighbours(q), attn_k=_neighbours(k), attn_v=v)
        own |= dict(attn_output=layer.out.weight)
        own |= dict(ffn_norm=layer.norm2.weight, ffn_gate=gate, ffn_up=up, ffn_down=layer.down.weight)
        weights.update({f"blk.{i}.{name}": weight for name, weight in own.items()})
    for name, weight in weights.items():
        stored = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        data = gguf.quants.quantize(weight.detach().numpy(), stored)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighbours(weight: Tensor) -> Tensor:
    """Reorder the rows of each head: llama.cpp rotates neighbours, `Llama` an element of each half."""
    return weight.unflatten(0, (-1, 2, Llama.head_dim // 2)).transpose(1, 2).flatten(0, 2)
