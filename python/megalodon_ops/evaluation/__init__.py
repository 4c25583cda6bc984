"""Perplexity and bits per byte of a model, as a function of the context length.

A document is a start token x_0 and tokens x_1, ... x_T. For a context of N tokens, its T predictions are cut into
windows of N, each with a fresh state:

    window k reads    x_{kN} ... x_{kN+N-1}          and predicts    x_{kN+1} ... x_{kN+N}

So for each N, every token of the text is predicted exactly once, from the 1 to N tokens before it in its window, and
figures of different contexts are over the same tokens. With the context "all", a document is one window.

A window is read in pieces, which pass on the state, so memory does not grow with contexts and documents.
"""

from .losses import evaluate
from .results import Context, Evaluation, PositionBin
from .windows import Document

__all__ = ["Context", "Document", "Evaluation", "PositionBin", "evaluate"]
