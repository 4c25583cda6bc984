"""Options of every command: the type, bounds, default and help of each flag.

The first line of a command's docstring is its summary; the others are examples in its help. The docstring of a base
class is the title of a group of flags. At the end of a help text, parentheses hold the default, if the field has None.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, to_builtins

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli.flags import REQUIRED, Amount, Encoding, Mesh, Options, flag

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
"""Product of the default peak learning rate and the model's width; see docs/training.md"""
CONTEXT_ROWS = 8
"""Default context length, as a multiple of --length; see docs/training.md"""
MINUTES = 5.0
"""Minutes of a run without --steps and --minutes"""
CONFIG_FIELDS = dict(dim="model_dim", layers="num_layers", heads="num_heads", chunk="chunk_size")
CONFIG_FIELDS |= dict(ffn_dim="ffn_hidden_dim", norm_groups="norm_num_groups")
"""Short option names -> fields of MegalodonConfig"""

LAUNCH_OPTIONS = ("out", "resume", "config", "mesh", "timeout", "dry_run")
"""Options of one call of `train`, which the run does not record"""
FILES = "text (a document each), .jsonl, .json lists, .csv, .parquet (a document in each entry), also as .gz; folders"
METRICS, CURVE = "metrics.jsonl", "loss_curve.png"
"""Files of a run"""
RUN = "folder of a run, a checkpoint or any saved model"
LIBRARY = "(Python's standard library)"
VOCABULARY = "a JSON file of the `tokenizers` package or a sentencepiece model, or a folder with one (none: bytes)"


@dataclass(kw_only=True)
class TextOptions(Options):
    """text"""

    data: tuple[Path, ...] | None = flag(None, f"{FILES} (the held-out text of the run)")
    glob: tuple[str, ...] | None = flag(
        None,
        "pattern of files to read in folders, such as '*.py' or 'src/*.c', even if not UTF-8; repeatable (text files)",
        action="append",
        metavar="PATTERN",
    )
    field: Text = flag("text", "field of a JSON object, or column of a table, that holds a document")
    encoding: Encoding | None = flag(None, "encoding of text and .csv files, such as cp1252 (UTF-8, or the bytes)")
    dry_run: bool = flag(False, "only list the files, each with how it would be read or why it is skipped")


@dataclass(kw_only=True)
class Info(Options):
    """show the build, the machine and the versions in use

    megalodon-ops info
    """


@dataclass(kw_only=True)
class ModelOptions(Options):
    """model: widths without a flag scale with --dim; the preset small is --dim 128 --layers 3 --chunk 256"""

    preset: Literal[MegalodonConfig.presets()] = flag("small", "configuration that the other flags change")
    dim: Natural | None = flag(None, "model width")
    layers: Natural | None = flag(None, "number of blocks")
    heads: Natural | None = flag(None, "attention heads")
    chunk: Natural | None = flag(None, "tokens in an attention chunk")
    z_dim: Natural | None = flag(None, "width of queries and keys, over all heads")
    value_dim: Natural | None = flag(None, "width of values, over all heads")
    ffn_dim: Natural | None = flag(None, "hidden units of the feed-forward layer")
    cema_ndim: Natural | None = flag(None, "complex CEMA states per channel")
    norm_groups: Natural | None = flag(None, "groups of the timestep norms")
    dropout: Probability | None = flag(None, "dropout of the outputs of attention and of the feed-forward layer")
    attention_dropout: Probability | None = flag(None, "probability that a key is hidden from a query (DropKey)")
    swiglu: bool | None = flag(None, "gate the feed-forward layer with a third matrix")
    share_emb: bool | None = flag(None, "use the embedding as output matrix")
    working_memory: bool | None = flag(None, "let each block read a memory of earlier chunks")
    visible_chunks: Natural | None = flag(None, "chunks that attention sees, 1 or 2")
    layerwise_ckpt: bool | None = flag(None, "recompute each layer in the backward pass, to save memory")

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of MegalodonConfig that were given."""
        names = [name for name in ModelOptions.__annotations__ if name != "preset"]
        return {config_field(name): value for name in names if (value := getattr(self, name)) is not None}


def config_field(name: str) -> str:
    """Return the field of MegalodonConfig that an option sets."""
    return CONFIG_FIELDS.get(name, name)


@dataclass(kw_only=True)
class BatchOptions(ModelOptions):
    """batches and optimizer"""

    # A batch has many short rows. Each row reads its own document, so a step learns from many documents.
    batch: Natural = flag(64, "rows in a batch")
    accumulate: Natural = flag(1, "batches per step; N train as one with N times the rows, in the memory of one")
    length: Natural = flag(64, "bytes or tokens in a row")
    context_length: Natural | None = flag(None, f"cut documents after each N tokens ({CONTEXT_ROWS} times --length)")
    end_token: bool = flag(True, "learn where documents end, so that generated text ends, too")
    optimizer: Literal["muon", "adamw"] = flag("muon", "muon (adamw for all but matrices of blocks), or adamw for all")
    lr: Positive | None = flag(None, f"peak learning rate ({RATE_TIMES_WIDTH} / width)")
    warmup: Natural = flag(100, "warmup steps; then the rate falls linearly to zero")
    weight_decay: NotNegative = flag(0.1, "weight decay of matrices")
    clip: Positive = flag(1.0, "maximum gradient norm")


@dataclass(kw_only=True)
class Train(BatchOptions, TextOptions):
    """train a model of bytes or tokens on text; without --data, on Python's standard library

    megalodon-ops train
    megalodon-ops train --data book.txt notes --glob '*.txt' --glob '*.md' --minutes 30 --out runs/prose
    megalodon-ops train --out runs/prose --resume --minutes 60
    megalodon-ops train --config runs/prose/options.json --seed 1 --out runs/again
    megalodon-ops train --tokenizer bpe.json --data book.txt
    megalodon-ops train --init-from runs/prose/best --data letters --validation recent.txt --lr 1e-3
    megalodon-ops train --steps 2000 --dim 256 --layers 6 --chunk 512 --lr 3e-3 --seed 1
    torchrun --nproc-per-node 4 --max-restarts 3 -m megalodon_ops train --mesh data=2,chunk=2 --batch 4 --length 8192 --out runs/four
    """

    data: tuple[Path, ...] | None = flag(None, f"{FILES}, or a folder of `tokenize` {LIBRARY}")
    validation: tuple[Path, ...] | None = flag(None, "held-out text, in files as --data (a twentieth of --data)")
    tokenizer: Path | None = flag(None, VOCABULARY)
    init_from: Path | None = flag(None, "run, checkpoint or model to start from, with its configuration and tokenizer")
    out: Path | None = flag(None, "folder of the run (runs/<time>); required with torchrun")
    resume: bool = flag(False, "continue the run in --out with its own flags")
    config: Path | None = flag(None, "JSON file of options, as a run's options.json; flags override it", metavar="FILE")
    steps: Natural | None = flag(None, "stop after N steps; the result does not depend on the clock")
    minutes: Positive | None = flag(None, f"stop after X minutes ({MINUTES:g}, unless --steps is given)")
    eval_every: Natural = flag(500, "steps between evaluations on held-out text")
    checkpoint_every: Natural = flag(200, "steps between checkpoints")
    seed: Seed = flag(0, "seed of weights, document order and dropout")
    device: str = flag("cpu", "device to compute on")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "dtype of matrix products; bfloat16 uses autocast")
    mesh: Mesh | None = flag(None, "processes that split rows, sequences (chunk) or layers (tensor) (all: data)")
    timeout: Positive = flag(600.0, "seconds that a process waits for the others")
    tensorboard: bool = flag(False, "also write the metrics for TensorBoard, to events in the folder")
    peak_tflops: Positive | None = flag(None, "peak TFLOPS of a device, for the MFU (known for A100, H100, H200, B200)")

    def record(self) -> dict[str, Any]:
        """Return the options that checkpoints and `options.json` record: those that describe the run, not a call."""
        values = to_builtins(self, enc_hook=str)
        left_out = LAUNCH_OPTIONS if self.init_from is None else (*LAUNCH_OPTIONS, "preset")
        return {name: value for name, value in values.items() if name not in left_out}


@dataclass(kw_only=True)
class ModelToRead(Options):
    """model"""

    checkpoint: Path = flag(REQUIRED, RUN)
    tokenizer: Path | None = flag(None, "tokenizer of a checkpoint whose folder has none")
    device: str = flag("cpu", "device to compute on")
    dtype: Literal["float32", "bfloat16"] | None = flag(None, "dtype of matrix products (the run's, or float32)")


@dataclass(kw_only=True)
class Eval(TextOptions, ModelToRead):
    """perplexity and bits per byte by context length, on held-out or given text

    megalodon-ops eval --checkpoint runs/prose
    megalodon-ops eval --checkpoint runs/prose --data other.txt --context 2048 8192 32768 all
    """

    context: tuple[Context, ...] = flag(("all",), "windows of N tokens, each read afresh; all: documents", metavar="N")
    end_token: bool = flag(False, "also count the loss of each document's end token")
    json: Path | None = flag(None, "file to write all figures to", metavar="FILE")
    batch: Count = flag(8, "documents read in parallel")


@dataclass(kw_only=True)
class Generate(ModelToRead):
    """print sampled text that continues a prompt

    megalodon-ops generate --checkpoint runs/prose --prompt 'Call me ' --tokens 500
    megalodon-ops generate --checkpoint runs/prose --prompt-file - --temperature 0.7 --top-p 0.9 < chapter.txt
    megalodon-ops generate --checkpoint runs/prose --prompt 'Q: ' --stop 'Q:' --samples 3 --tokens 100 --min-p 0.05
    """

    prompt: tuple[str, ...] = flag((), "text to continue; repeatable (a new document)", action="append", metavar="TEXT")
    prompt_file: Path | None = flag(None, "file to continue; - is standard input")
    tokens: Natural = flag(1000, "maximum tokens to generate")
    stop: tuple[Text, ...] = flag((), "end before this text; repeatable", action="append", metavar="TEXT")
    samples: Count = flag(1, "number of continuations of a prompt")
    temperature: NotNegative = flag(0.8, "sampling temperature; 0 takes the likeliest token")
    top_k: Count | None = flag(None, "sample from the N likeliest tokens")
    top_p: Fraction | None = flag(None, "sample from the smallest set of likeliest tokens with total probability X")
    min_p: Fraction | None = flag(None, "sample from tokens at least X times as likely as the likeliest")
    repetition_penalty: Positive | None = flag(None, "above 1, makes tokens of the text so far less likely")
    cache_dtype: Literal["int8", "model"] | None = flag(None, "dtype of keys and values (int8 after `quantize`)")
    seed: Seed = flag(0, "seed of the samples")


@dataclass(kw_only=True)
class Quantize(TextOptions):
    """write a model with weights of 8 or 4 bits, and compare size, bits per byte and tokens a second

    megalodon-ops quantize runs/prose --to int8 --out prose-int8
    megalodon-ops quantize model --to int4 --out model-int4 --dtype bfloat16 --data other.txt
    """

    checkpoint: Path = flag(REQUIRED, RUN, positional=True, metavar="RUN")
    to: Literal["int8", "int4"] = flag(REQUIRED, "kind of the weights")
    activations: Literal["int8", "none"] = flag("int8", "let prompts round activations to 8 bits, which is faster")
    out: Path = flag(REQUIRED, "folder to write", metavar="DIR")
    tokenizer: Path | None = flag(None, "tokenizer of a checkpoint whose folder has none")
    dtype: Literal["float32", "bfloat16"] | None = flag(None, "dtype of activations (the checkpoint's)")


@dataclass(kw_only=True)
class Export(Options):
    """write a model as ONNX files, which run without this package and PyTorch, or as a page for a browser

    megalodon-ops export --checkpoint runs/prose --out prose-onnx
    megalodon-ops export --checkpoint runs/prose --web page --onnxruntime-web node_modules/onnxruntime-web/dist
    """

    checkpoint: Path = flag(REQUIRED, RUN, metavar="RUN")
    out: Path | None = flag(None, "folder to write", metavar="FOLDER")
    web: Path | None = flag(None, "folder to write, with a page that writes text in a browser", metavar="FOLDER")
    onnxruntime_web: Path | None = flag(None, "folder dist of npm's onnxruntime-web, for the page", metavar="FOLDER")
    dtype: Literal["float32", "float16", "int8"] = flag("float32", "of weights; int8 also rounds inputs of products")
    tokenizer: Path | None = flag(None, "tokenizer of a checkpoint whose folder has none")


@dataclass(kw_only=True)
class TrainTokenizer(TextOptions):
    """train a byte-level BPE tokenizer, or print the bytes per token of a tokenizer (`tokenize` writes tokens)

    megalodon-ops tokenizer --train --vocab-size 4096 --out bpe.json book.txt notes --glob '*.txt'
    megalodon-ops tokenizer --tokenizer bpe.json other.txt
    """

    data: tuple[Path, ...] = flag((), FILES, positional=True, nargs="*", metavar="FILE")
    train: bool = flag(False, "train on the FILEs, without the text that `train` holds out (Python's standard library)")
    vocab_size: Annotated[int, Meta(gt=257, lt=1 << 24)] | None = flag(None, "most ids: bytes, merges, a start token")
    out: Path | None = flag(None, "file to write", metavar="FILE")
    tokenizer: Path | None = flag(None, "tokenizer to measure on the FILEs: a file, or a folder with one")


@dataclass(kw_only=True)
class Tokenize(TextOptions):
    """encode text into a folder of tokens, for `train --data` (`tokenizer` makes the tokenizer)

    megalodon-ops tokenize --tokenizer bpe.json --out tokens crawl.jsonl books
    megalodon-ops tokenize --out tokens pages --glob '*.html'
    """

    data: tuple[Path, ...] = flag((), f"{FILES} {LIBRARY}", positional=True, nargs="*", metavar="FILE")
    out: Path = flag(REQUIRED, "folder to write, or to continue", metavar="DIR")
    tokenizer: Path | None = flag(None, VOCABULARY)
    shard_size: Annotated[int, Meta(ge=1, lt=1 << 20)] = flag(
        64, "MiB of text in a shard, of which a kill loses one; compressed files and row groups stay whole"
    )


@dataclass(kw_only=True)
class Plan(ModelOptions):
    """memory, operations and exchanged bytes of a training step on given devices

    megalodon-ops plan --preset paper7B --mesh data=128,chunk=2 --context 32768 --device cuda --layerwise-ckpt
    megalodon-ops plan --mesh data=2 --batch 64 --dtype float32
    megalodon-ops plan --memory 8GB --batch 16 --context 2048
    """

    params: Amount | None = flag(None, "list configurations near this number of parameters, such as 50M")
    memory: Amount | None = flag(None, "list configurations, and what makes each fit in a device's memory, such as 8GB")
    measure: bool = flag(False, "in such a list, time training steps of one chunk on this machine's CPU")
    mesh: Mesh | None = flag(None, "devices that split rows (data), length (chunk) and matrices (tensor) (one device)")
    device: Literal["cpu", "cuda"] = flag("cpu", "kind of the devices")
    context: Natural | None = flag(None, "tokens of a sequence (8 chunks)")
    batch: Natural | None = flag(None, "sequences of a step on all devices (as many as the mesh's data)")
    dtype: Literal["float32", "bfloat16", "autocast"] = flag(
        "bfloat16", "dtype of products and activations; autocast: bfloat16 products of float32 parameters"
    )
    param_dtype: Literal["float32", "bfloat16"] = flag("float32", "dtype of matrices, gradients and Adam's moments")
    replicate: bool = flag(False, "each device keeps all parameters instead of a part of them")
    json: Path | None = flag(None, "write all figures; - prints them instead", metavar="FILE")
    vocab: Natural | None = flag(None, "ids of the tokenizer (the preset's, or bytes)")


@dataclass(kw_only=True)
class Plot(Options):
    """draw the loss curve of a run, or compare those of several

    megalodon-ops plot runs/prose
    megalodon-ops plot runs/prose runs/again --by minutes --out both.png
    """

    runs: tuple[Path, ...] = flag(REQUIRED, "folders of runs", positional=True, nargs="+", metavar="RUN")
    by: Literal["step", "tokens", "minutes"] = flag("step", "horizontal axis")
    out: Path | None = flag(None, f"picture to write, PNG ({CURVE} of a single run)", metavar="FILE")


COMMANDS: dict[str, type[Options]] = {
    "info": Info,
    "train": Train,
    "eval": Eval,
    "generate": Generate,
    "quantize": Quantize,
    "export": Export,
    "tokenizer": TrainTokenizer,
    "tokenize": Tokenize,
    "plan": Plan,
    "plot": Plot,
}
