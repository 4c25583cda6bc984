"""The paper's claims at sizes that are easy to rerun: `python -m bench.claims CLAIM`. docs/claims.md has the results."""
