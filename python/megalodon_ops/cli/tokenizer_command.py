"""`tokenizer`: train a byte-level BPE on text, or measure a tokenizer on text."""

import time
from collections.abc import Sequence

from megalodon_ops.cli.data import load_corpus, load_documents
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.models import read_tokenizer
from megalodon_ops.cli.options import TrainTokenizer
from megalodon_ops.storage.files import write_whole
from megalodon_ops.tokenizers import Tokenizer


def run(options: TrainTokenizer) -> int:
    if options.train:
        return _train(options)
    for flag, given in (("--out", options.out), ("--vocab-size", options.vocab_size)):
        if given is not None:
            raise CommandError(f"{flag}: needs --train")
    if options.tokenizer is None:
        raise CommandError("give --train to train a tokenizer, or --tokenizer FILE to measure one")
    tokenizer = read_tokenizer(options.tokenizer)
    documents = load_documents(options.data, options) if options.data or options.glob else []
    opens = f"{tokenizer.start}, {tokenizer.start_token}, opens a document"
    ends = f"{tokenizer.end}, {tokenizer.end_token}, ends it" if tokenizer.end != tokenizer.start else "and ends it"
    print(f"{options.tokenizer}: {tokenizer.vocab_size:,} ids; {opens}, {ends}")
    if documents:
        print(_figures(tokenizer, documents, "the text"))
    return 0


def _train(options: TrainTokenizer) -> int:
    if options.out is None or options.vocab_size is None:
        raise CommandError("--train: needs --vocab-size N, the maximum number of ids, and --out FILE, to write")
    if options.tokenizer is not None:
        raise CommandError("--tokenizer: cannot be combined with --train, which makes a new one")
    if options.out.is_dir():
        raise CommandError(f"--out {options.out}: a folder, name a file")
    corpus = load_corpus(options.data, options)
    begin = time.monotonic()
    tokenizer = Tokenizer.train(corpus.train, vocab_size=options.vocab_size)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, tokenizer.content)
    except OSError as error:
        raise CommandError(f"--out {options.out}: could not be written: {error.strerror}") from error
    seconds = time.monotonic() - begin
    print(f"{options.out}: {tokenizer.vocab_size:,} ids, from {corpus.num_bytes:,} bytes of text in {seconds:.1f} s")
    print(_figures(tokenizer, corpus.held_out, "held-out text"))
    return 0


def _figures(tokenizer: Tokenizer, documents: Sequence[bytes], title: str) -> str:
    ids = tokenizer.encode_batch(documents)
    tokens = sum(map(len, ids))
    size = sum(map(len, documents))
    num_exact = sum(tokenizer.decode(row) == document for row, document in zip(ids, documents, strict=True))
    exact = "" if num_exact == len(documents) else f"; {len(documents) - num_exact} are not decoded exactly"
    per_token = f"{size / tokens:.3f}" if tokens else "no"
    return f"{title}: {len(documents)} documents, {size:,} bytes, {tokens:,} tokens: {per_token} bytes a token{exact}"
