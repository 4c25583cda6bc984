"""Three ways to decode a token: a call of the model, `Decoder`, and the file `step.onnx` in onnxruntime.

The model is that of `megalodon-ops train`, and mega200M. onnxruntime writes keys and values in place and the other states
into a second buffer, as in docs/elsewhere.md, with as many threads as torch. Needs the extra `onnx`.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path as FilePath

import torch
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.storage.onnx_export import export_onnx

from .bench_model import QUICK
from .harness import OURS, Case, Outputs, Path

DECODED = 16
TOLERANCE = 1e-3


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu or any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        return
    presets = {name: mo.MegalodonConfig.preset(name) for name in ("small", "mega200M")}
    for name, config in ({"2M": mo.MegalodonConfig(**QUICK)} if quick else presets).items():
        yield _case(name, config)


class Session:
    """A sequence that onnxruntime decodes from `step.onnx`."""

    def __init__(self, folder: FilePath) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / "step.onnx", options)
        state = json.loads((folder / "config.json").read_text())["state"]

        def value(shape: list, dtype: str) -> onnxruntime.OrtValue:
            zeros = torch.zeros([1, *shape[1:]], dtype=getattr(torch, dtype))
            return onnxruntime.OrtValue.ortvalue_from_numpy(zeros.numpy())

        # Steps read one set of states and write the other, in turn; both sets share the keys and values.
        even, odd = ({entry["name"]: value(entry["shape"], entry["dtype"]) for entry in state} for _ in range(2))
        odd |= {name: shared for name, shared in even.items() if ".attention." in name}
        self.initial_state = even
        self.token = value([1, 1], "int64")
        self.turn = 0
        self.bindings = []
        for old, new in ((even, odd), (odd, even)):
            binding = session.io_binding()
            binding.bind_ortvalue_input("tokens", self.token)
            for name in old:
                binding.bind_ortvalue_input(name, old[name])
                binding.bind_ortvalue_output(f"new.{name}", new[name])
            binding.bind_output("logits")
            self.bindings.append(binding)
        self.session = session

    def set_state(self, state: mo.MegalodonState) -> None:
        self.turn = 0
        for value, tensor in zip(self.initial_state.values(), state.to_reference(), strict=True):
            value.update_inplace(tensor.contiguous().numpy())

    def __call__(self, token: Tensor) -> Tensor:
        """Return the logits (1, 1, V) after a token (1, 1)."""
        binding = self.bindings[self.turn % 2]
        self.turn += 1
        self.token.update_inplace(token.numpy())
        self.session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[-1].numpy()).clone()  # the next run writes to the same memory


@torch.no_grad()
def _case(name: str, config: mo.MegalodonConfig) -> Case:
    torch.manual_seed(0)
    model = mo.Megalodon(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, f"{folder}/out")
        session = Session(FilePath(folder, "out"))
    tokens = torch.randint(config.vocab_size, (1, config.chunk_size), generator=torch.Generator().manual_seed(1))
    context, new = tokens[:, :-DECODED], tokens[:, -DECODED:].split(1, 1)
    _, start = model(context, return_state=True)
    state = start
    decoder: mo.Decoder | None = None

    def restore(kind: str) -> None:
        nonlocal decoder, state
        if kind == "Decoder":
            decoder = mo.Decoder(model, start)
        elif kind == "model":
            state = start.clone()
        else:
            session.set_state(start)

    def decode() -> Outputs:
        return (torch.cat([decoder(token) for token in new], 1),)

    @torch.no_grad()
    def call() -> Outputs:
        nonlocal state
        logits = []
        for token in new:
            y, state = model(token, state=state, return_state=True, inplace_state=True)
            logits.append(y)
        return (torch.cat(logits, 1),)

    def run() -> Outputs:
        return (torch.cat([session(token) for token in new], 1),)

    @torch.no_grad()
    def expected() -> Outputs:
        return (model(tokens[:, -DECODED:], state=start),)

    paths = [
        Path(OURS, decode, before=lambda: restore("Decoder")),
        Path("a call of the model", call, before=lambda: restore("model"), rival=False),
        Path("onnxruntime", run, before=lambda: restore("ONNX"), rival=False),
    ]
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    cached = context.shape[1] * config.num_layers * (config.z_dim + config.value_dim)
    return Case(
        name=f"decode {DECODED} tokens after {context.shape[1]}",
        shape=name,
        dtype="fp32",
        paths=paths,
        expected=expected,
        tolerance=TOLERANCE,
        units=DECODED,
        unit="token",
        flops=2 * DECODED * (weights + cached),
        bytes=4 * DECODED * (weights + cached),
        cold=False,
        fewer_threads=False,
    )
