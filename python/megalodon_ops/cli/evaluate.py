"""`eval`: perplexity and bits per byte by context length, in constant memory."""

import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy

import megalodon_ops
from megalodon_ops import evaluation
from megalodon_ops.cli.console import bytes_bar
from megalodon_ops.cli.data import find_files, load_data, load_documents
from megalodon_ops.cli.documents import is_plain
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.models import TrainRecord, precision, trained_model, usable_device
from megalodon_ops.cli.options import Eval, Quantize
from megalodon_ops.evaluation import Evaluation, evaluate
from megalodon_ops.storage.files import write_whole
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training.batches import Document

_READ = 1 << 14  # bytes of a document read at a time


def run(options: Eval) -> int:
    if options.json is not None and not options.json.absolute().parent.is_dir():  # before anything is computed
        raise CommandError(f"--json {options.json}: no such folder: {options.json.absolute().parent}")
    device = usable_device(options.device)
    trained = trained_model(options.checkpoint, device, options.tokenizer, options.dtype)
    documents, text = read_documents(options, trained.record)
    total = sum(map(len, documents))
    step = "" if trained.record is None else f"; step {trained.record.step}"
    print(f"{text}: {len(documents)} documents, {total:,} bytes{step}")
    contexts = list(dict.fromkeys(options.context))
    with bytes_bar(total * len(contexts)) as bar, precision(device, options.dtype or trained.dtype):
        try:
            texts = as_documents(documents, trained.tokenizer, bar.update, ends=options.end_token)
            results = evaluate(trained.model, texts, contexts=contexts, rows=options.batch)
        except IndexError as error:
            raise CommandError(f"--data: the text has tokens that the model does not predict: {error}") from error
    print(report(results))
    if options.json is not None:
        content = dict(megalodon_ops=megalodon_ops.__version__, checkpoint=str(options.checkpoint), text=text)
        content |= dict(documents=len(documents), contexts=[each.to_dict() for each in results])
        write_whole(options.json, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    return 0


def report(results: Sequence[Evaluation]) -> str:
    """Format the results: a line for one context, a table for more."""
    if len(results) == 1:
        (only,) = results
        per_token = "" if only.tokens == only.num_bytes else f", {only.perplexity:.4f} per token"
        return f"{only.bits_per_byte:.4f} bits per byte, perplexity {only.perplexity_per_byte:.4f} per byte{per_token}"
    lines = [f"{'context':>12} {'bits per byte':>14} {'perplexity per byte':>20} {'per token':>12} {'tokens':>14}"]
    for result in results:
        context = result.context if result.context == "all" else f"{result.context:,}"
        per_byte = f"{result.bits_per_byte:>14.4f} {result.perplexity_per_byte:>20.4f}"
        lines.append(f"{context:>12} {per_byte} {result.perplexity:>12.4f} {result.tokens:>14,}")
    return "\n".join(lines)


@dataclass
class _EncodedDocument:
    """Tokens of a document; each iteration encodes them anew, piece by piece."""

    document: Document
    tokenizer: Tokenizer
    read: Callable[[int], object]
    ends: bool

    def __iter__(self) -> Iterator[Sequence[int]]:
        yield [self.tokenizer.start]
        yield from self.tokenizer.encode_pieces(self._pieces())
        if self.ends:
            yield [self.tokenizer.end]

    def _pieces(self) -> Iterator[bytes]:
        for start in range(0, len(self.document), _READ):
            piece = bytes(self.document[start : start + _READ])
            self.read(len(piece))
            yield piece


def as_documents(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    read: Callable[[int], object] = lambda _: None,
    *,
    ends: bool = False,
) -> list[evaluation.Document]:
    """Return documents for `evaluate`, longest first; `ends`: with end tokens; `read` is told each read's bytes."""
    longest_first = sorted(documents, key=len, reverse=True)
    return [evaluation.Document(_EncodedDocument(each, tokenizer, read, ends), len(each)) for each in longest_first]


def compressed_bits(documents: Sequence[bytes]) -> dict[str, float]:
    """Return the bits per byte of general-purpose compressors on the concatenated documents."""
    size = sum(map(len, documents))
    # xz needs 10 times its dictionary's memory. One of the text's size compresses as well as the 64 MiB of `xz -9`.
    xz = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, min(size, 64 << 20))}
    gzip = zlib.compressobj(9, wbits=31)  # zlib's code for gzip's header and the largest window
    bits = {}
    for name, compressor in {"gzip -9": gzip, "xz -9": lzma.LZMACompressor(filters=[xz])}.items():
        compressed = sum(len(compressor.compress(document)) for document in documents) + len(compressor.flush())
        bits[name] = 8 * compressed / size
    return bits


def read_documents(options: Eval | Quantize, record: TrainRecord | None) -> tuple[Sequence[Document], str]:
    """Return the user's documents, or else the run's held-out documents, and a name for them."""
    if options.data or options.glob:
        documents: list[Document] = []
        for path in find_files(options.data, options):
            if is_plain(path, options):
                documents.append(numpy.memmap(path, mode="r"))
            else:
                documents += load_documents([path], options)
        return documents, " ".join(map(str, options.data))
    if record is None:
        raise CommandError(f"--checkpoint {options.checkpoint}: not a run of `train` with held-out text; give --data")
    corpus = load_data(record.options, quiet=True)
    if corpus.fingerprint != record.data.fingerprint:
        raise CommandError("the run's text has changed, so its held-out text is unknown; give --data")
    return corpus.held_out, "held-out text of the run"
