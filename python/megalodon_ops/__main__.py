"""`python -m megalodon_ops {info, train, eval, generate, convert, tokenizer, tokenize}`."""

from megalodon_ops.cli import main

raise SystemExit(main())
