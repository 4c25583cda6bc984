"""How well a model predicts text, as a function of the context that it reads: perplexity and bits per byte.

A document is tokens x_0, x_1, ... x_T, of which x_0 opens it. For a context of N tokens its T predictions are cut into
windows of N, each of which starts afresh:

    window k reads    x_{kN} ... x_{kN+N-1}          and predicts    x_{kN+1} ... x_{kN+N}

So every token of the text is predicted exactly once, whatever N is, from the 1 to N tokens that its window holds before
it, and figures of different contexts are over the same tokens. The context "all" is one window for the document: the
state is carried from its first token to its last.

A window is read in pieces, its state passed on, so memory is constant however long contexts and documents are.
"""

from .losses import evaluate
from .results import Context, Evaluation, PositionBin
from .windows import Document

__all__ = ["Context", "Document", "Evaluation", "PositionBin", "evaluate"]
