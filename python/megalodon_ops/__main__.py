"""`python -m megalodon_ops {info, train, eval, generate, quantize, tokenizer, tokenize, plan}`."""

import importlib

import megalodon_ops
import megalodon_ops_startup

megalodon_ops_startup.prepare()
importlib.reload(megalodon_ops)  # now with its public names, which load torch

from megalodon_ops.cli import process  # noqa: E402

process()
