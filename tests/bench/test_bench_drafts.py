"""`bench.drafts` counts calls and guesses, and says whether the tokens are the same."""

import torch
from models import tiny_model

from bench import drafts


def test_a_draft_that_is_right_keeps_all_guesses(monkeypatch):
    monkeypatch.setattr(drafts, "NEW", 25)
    monkeypatch.setattr(drafts, "WAYS", {"no draft": {}, "right": dict(draft_tokens=4)})
    model, draft = tiny_model().eval(), tiny_model().eval()
    rows = drafts.measure(model, draft, [torch.randint(31, (1, 9)) for _ in range(2)], 0.7)
    columns = [row.strip("|").split("|") for row in rows]
    assert [(way, calls, kept, equal) for _, way, _, calls, kept, equal in columns] == [
        ("no draft", "1.00", "", "2 of 2"),
        ("right", "0.20", "100%", "2 of 2"),  # each call yields the 4 guesses and one more token
    ]
