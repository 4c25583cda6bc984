"""The options of every command: the one place where a flag has its type, bounds, default and help.

The first line of a class's docstring says what the command does, the others are examples for its help.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, to_builtins

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli.flags import REQUIRED, Mesh, Options, flag

Natural = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=1, lt=1 << 31)]
Seed = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
NotNegative = Annotated[float, Meta(ge=0, le=1e30)]
Probability = Annotated[float, Meta(ge=0, lt=1)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
Text = Annotated[str, Meta(min_length=1)]
Context = Annotated[int, Meta(ge=1, lt=1 << 62)] | Literal["all"]

RATE_TIMES_WIDTH = 1.28
"""The default peak of the learning rate, times the model's width: docs/training.md"""
ROWS_OF_CONTEXT = 8
"""The default context length in rows' lengths: docs/training.md"""
MINUTES = 5.0
"""How long a run takes that names neither --steps nor --minutes"""
CONFIG_FIELDS = {
    "dim": "model_dim",
    "layers": "num_layers",
    "heads": "num_heads",
    "chunk": "chunk_size",
    "ffn_dim": "ffn_hidden_dim",
    "norm_groups": "norm_num_groups",
}
"""Options of a model whose names are shorter than those of MegalodonConfig's fields"""

OF_LAUNCH = ("out", "resume", "config", "mesh", "timeout")
"""Options of `train` that say nothing of the run itself"""
GLOB = "of folders, take the files that match, such as '*.py' or 'src/*.c', text or not; repeatable (those of text)"
VOCABULARY = "a JSON file of the `tokenizers` package or a sentencepiece model, or a folder with one (none: bytes)"


@dataclass(kw_only=True)
class Info(Options):
    """what was built, and what it runs on

    python -m megalodon_ops info
    """


@dataclass(kw_only=True)
class ModelOptions(Options):
    """model: widths that are not given keep the preset's proportion to --dim; small is --dim 128 --layers 3 --chunk 256"""

    preset: Literal[MegalodonConfig.presets()] = flag("small", "where to start")
    dim: Natural | None = flag(None, "width of the model")
    layers: Natural | None = flag(None, "blocks")
    heads: Natural | None = flag(None, "of the attention")
    chunk: Natural | None = flag(None, "steps that attend to each other")
    z_dim: Natural | None = flag(None, "width of queries and keys, all heads")
    value_dim: Natural | None = flag(None, "width of values, all heads")
    ffn_dim: Natural | None = flag(None, "hidden units of the feed-forward half")
    cema_ndim: Natural | None = flag(None, "complex states a channel")
    norm_groups: Natural | None = flag(None, "groups of the timestep norms")
    dropout: Probability | None = flag(None, "of what each half of a block adds")
    attention_dropout: Probability | None = flag(None, "probability of DropKey")
    swiglu: bool | None = flag(None, "gate the feed-forward half by a third matrix")
    share_emb: bool | None = flag(None, "take the embedding for the output matrix")
    working_memory: bool | None = flag(None, "let each block look up what lies before its chunk")
    visible_chunks: Natural | None = flag(None, "chunks that attention sees: 1 or 2")
    layerwise_ckpt: bool | None = flag(None, "recompute each layer in the backward, for less memory")

    def of_config(self) -> dict[str, Any]:
        """The fields of MegalodonConfig that were given."""
        names = [name for name in ModelOptions.__annotations__ if name != "preset"]
        return {config_field(name): value for name in names if (value := getattr(self, name)) is not None}


def config_field(name: str) -> str:
    """The field of MegalodonConfig that an option sets."""
    return CONFIG_FIELDS.get(name, name)


@dataclass(kw_only=True)
class BatchOptions(ModelOptions):
    """batches and optimizer"""

    # Many documents at once: a batch teaches as much as its rows differ.
    batch: Natural = flag(64, "rows in a batch")
    accumulate: Natural = flag(
        1, "batches of a step: it learns what a batch N times larger teaches, in a batch's memory"
    )
    length: Natural = flag(64, "bytes, or tokens, in a row")
    context_length: Natural | None = flag(
        None, f"cut documents of more tokens into parts that are read as documents ({ROWS_OF_CONTEXT} times --length)"
    )
    end_token: bool = flag(True, "learn where documents end, so that what is generated ends, too")
    optimizer: Literal["muon", "adamw"] = flag(
        "muon", "muon for the matrices of the blocks and adamw for the rest, or adamw"
    )
    lr: Positive | None = flag(None, f"peak learning rate ({RATE_TIMES_WIDTH} / width)")
    warmup: Natural = flag(100, "steps of warmup, then a line to zero")
    weight_decay: NotNegative = flag(0.1, "of weight matrices")
    clip: Positive = flag(1.0, "largest norm of the gradient")


@dataclass(kw_only=True)
class Train(BatchOptions):
    """train a model of bytes, or of tokens, on text; without --data, on Python's standard library

    python -m megalodon_ops train
    python -m megalodon_ops train --data book.txt notes --glob '*.txt' --glob '*.md' --minutes 30 --out runs/prose
    python -m megalodon_ops train --out runs/prose --resume --minutes 60
    python -m megalodon_ops train --config runs/prose/options.json --seed 1 --out runs/again
    python -m megalodon_ops train --tokenizer bpe.json --data book.txt
    python -m megalodon_ops train --steps 2000 --dim 256 --layers 6 --chunk 512 --lr 3e-3 --seed 1
    torchrun --nproc-per-node 4 --max-restarts 3 -m megalodon_ops train --mesh data=2,chunk=2 --batch 4 --length 8192 --out runs/four
    """

    data: tuple[Path, ...] | None = flag(
        None, "files and folders of text, or a folder that `tokenize` made (Python's standard library)"
    )
    glob: tuple[str, ...] | None = flag(None, GLOB, action="append", metavar="PATTERN")
    tokenizer: Path | None = flag(None, VOCABULARY)
    out: Path | None = flag(None, "folder of the run (runs/<time>); of several processes it must be named")
    resume: bool = flag(False, "continue the run in --out; other flags come from it")
    config: Path | None = flag(
        None, "options of a run, such as the options.json in another's folder; flags go before them", metavar="FILE"
    )
    steps: Natural | None = flag(None, "stop after N steps; nothing then depends on the clock")
    minutes: Positive | None = flag(None, f"stop after X minutes ({MINUTES:g}, unless --steps is given)")
    eval_every: Natural = flag(500, "steps between looks at held-out text")
    checkpoint_every: Natural = flag(200, "steps between checkpoints")
    seed: Seed = flag(0, "of weights, order of documents, dropout")
    device: str = flag("cpu", "where to compute")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16 is autocast")
    mesh: Mesh | None = flag(
        None,
        "how processes that torchrun has started share a batch, its rows over data, its length over chunk and layers "
        "over tensor (data=<their number>)",
    )
    timeout: Positive = flag(600.0, "seconds that processes wait for each other before they give up")
    tensorboard: bool = flag(False, "write the metrics into the folder's events for TensorBoard, too")
    peak_tflops: Positive | None = flag(
        None, "of each device, to log how much of its peak the model's operations are (known of A100, H100, H200, B200)"
    )

    def record(self) -> dict[str, Any]:
        """What a checkpoint and `options.json` record: the options of the run, not those of the launch."""
        values = to_builtins(self, enc_hook=str)
        return {name: value for name, value in values.items() if name not in OF_LAUNCH}


@dataclass(kw_only=True)
class ModelToRead(Options):
    """model"""

    checkpoint: Path = flag(REQUIRED, "a run's folder, one checkpoint's, or any that holds a model")
    tokenizer: Path | None = flag(None, "of a checkpoint whose folder has none")
    device: str = flag("cpu", "where to compute")
    dtype: Literal["float32", "bfloat16"] | None = flag(None, "bfloat16 is autocast (that of the run, or float32)")


@dataclass(kw_only=True)
class Eval(ModelToRead):
    """perplexity and bits per byte of a model by context, on held-out or given text of any length

    python -m megalodon_ops eval --checkpoint runs/prose
    python -m megalodon_ops eval --checkpoint runs/prose --data other.txt --context 2048 8192 32768 all
    """

    data: tuple[Path, ...] | None = flag(None, "files and folders of text (the held-out text of the run)")
    glob: tuple[str, ...] | None = flag(None, GLOB, action="append", metavar="PATTERN")
    context: tuple[Context, ...] = flag(
        ("all",), "predict from at most N tokens, in windows that each start afresh, or from all before", metavar="N"
    )
    end_token: bool = flag(False, "count the prediction of each document's end, too, which is no byte of it")
    json: Path | None = flag(None, "write all figures", metavar="FILE")
    batch: Count = flag(8, "documents read side by side")


@dataclass(kw_only=True)
class Generate(ModelToRead):
    """print a sampled continuation

    python -m megalodon_ops generate --checkpoint runs/prose --prompt 'Call me ' --tokens 500
    python -m megalodon_ops generate --checkpoint runs/prose --prompt-file - --temperature 0.7 --top-p 0.9 < chapter.txt
    python -m megalodon_ops generate --checkpoint runs/prose --prompt 'Q: ' --stop 'Q:' --samples 3 --tokens 100 --min-p 0.05
    """

    prompt: str = flag("", "text to continue (none: a new document)")
    prompt_file: Path | None = flag(None, "file to continue instead; - is standard input")
    tokens: Natural = flag(1000, "how many to write")
    stop: tuple[Text, ...] = flag((), "end before it; repeatable", action="append", metavar="TEXT")
    samples: Count = flag(1, "continuations of the prompt")
    temperature: NotNegative = flag(0.8, "0 takes the likeliest token")
    top_k: Count | None = flag(None, "sample among the N likeliest tokens")
    top_p: Fraction | None = flag(None, "sample among the likeliest tokens of mass X")
    min_p: Fraction | None = flag(None, "sample among tokens at least X times as likely as the likeliest")
    repetition_penalty: Positive | None = flag(None, "above 1, makes tokens that were read or written less likely")
    seed: Seed = flag(0, "of the samples")


@dataclass(kw_only=True)
class TrainTokenizer(Options):
    """train a byte-level BPE on text, or see what a tokenizer makes of text

    python -m megalodon_ops tokenizer --train --vocab-size 4096 --out bpe.json book.txt notes --glob '*.txt'
    python -m megalodon_ops tokenizer --tokenizer bpe.json other.txt
    """

    files: tuple[Path, ...] = flag((), "text, or folders of it", positional=True, nargs="*", metavar="FILE")
    glob: tuple[str, ...] | None = flag(None, GLOB, action="append", metavar="PATTERN")
    train: bool = flag(False, "learn from the FILEs (Python's standard library) what `train` learns from")
    vocab_size: Annotated[int, Meta(gt=257, lt=1 << 24)] | None = flag(
        None, "most ids: 256 bytes, merges, and one that opens a document"
    )
    out: Path | None = flag(None, "the file to write", metavar="FILE")
    tokenizer: Path | None = flag(None, "a tokenizer's file, or a folder with one, to see what it makes of the FILEs")


@dataclass(kw_only=True)
class Tokenize(Options):
    """encode text into a folder of tokens, which `train --data` maps into memory

    python -m megalodon_ops tokenize --tokenizer bpe.json --out tokens crawl.jsonl books
    python -m megalodon_ops tokenize --out tokens pages --glob '*.html'
    """

    files: tuple[Path, ...] = flag(
        (),
        "text, each file a document; .jsonl, each line an object with a document; or folders (Python's standard library)",
        positional=True,
        nargs="*",
        metavar="FILE",
    )
    glob: tuple[str, ...] | None = flag(None, GLOB, action="append", metavar="PATTERN")
    out: Path = flag(REQUIRED, "the folder to make, or to go on with", metavar="DIR")
    tokenizer: Path | None = flag(None, VOCABULARY)
    field: Text = flag("text", "of lines of JSON, what holds the document")
    shard_size: Annotated[int, Meta(ge=1, lt=1 << 20)] = flag(
        64, "MiB of text in a shard, what is made anew after a kill; a longer file of text stays whole"
    )


@dataclass(kw_only=True)
class Plan(ModelOptions):
    """memory, operations and exchanged bytes of a training step on given devices

    python -m megalodon_ops plan --preset paper7B --mesh data=128,chunk=2 --context 32768 --device cuda --layerwise-ckpt
    python -m megalodon_ops plan --mesh data=2 --batch 64 --dtype float32
    """

    mesh: Mesh | None = flag(
        None, "how devices share a batch: rows over data, length over chunk, matrices over tensor (one device)"
    )
    device: Literal["cpu", "cuda"] = flag("cpu", "kind of the devices")
    context: Natural | None = flag(None, "tokens of a sequence (8 chunks)")
    batch: Natural | None = flag(None, "sequences of a step, of all devices (one for each of data)")
    dtype: Literal["float32", "bfloat16", "autocast"] = flag(
        "bfloat16", "of products and activations; autocast: bfloat16 products of float32 parameters"
    )
    param_dtype: Literal["float32", "bfloat16"] = flag("float32", "of matrices, their gradients and Adam's moments")
    replicate: bool = flag(False, "a device keeps all parameters, and not a part of them")
    json: Path | None = flag(None, "write all figures; - prints them instead", metavar="FILE")
    vocab: Natural | None = flag(None, "ids of the tokenizer (the preset's, or bytes)")


COMMANDS: dict[str, type[Options]] = {
    "info": Info,
    "train": Train,
    "eval": Eval,
    "generate": Generate,
    "tokenizer": TrainTokenizer,
    "tokenize": Tokenize,
    "plan": Plan,
}
