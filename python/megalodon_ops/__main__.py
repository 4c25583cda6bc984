"""`python -m megalodon_ops {info, train, eval, generate, tokenizer, tokenize, convert, plan}`."""

from megalodon_ops.cli import process

process()
