"""`python -m megalodon_ops {info, train, eval, generate}`."""

from megalodon_ops.cli import main

raise SystemExit(main())
