"""Benches of the ops and the model on the CPU: `python -m bench` in the repository's root. See README.md."""
