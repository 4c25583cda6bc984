"""The paper's claims at sizes that anyone can rerun: `python -m bench.claims CLAIM`; docs/claims.md says how each is decided."""
