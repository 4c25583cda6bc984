"""transformers: attention masks. Rows with padding give what they give without."""

from __future__ import annotations

import pytest
import torch
from hf_models import seed  # noqa: F401, a fixture
from hf_models import VARIANTS, close, hf, build_model, padded, prompts
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops.hf.cache import CACHE

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_padded_rows_equal_single_runs(side: str, fields: dict) -> None:
    model, rows = build_model(**fields), prompts()
    batch = padded(rows, side, value=-1)
    with torch.no_grad():
        output = model(**batch, labels=batch["input_ids"])
        hidden = model(**batch, output_hidden_states=True).hidden_states
        assert len(hidden) == 3
        total = 0
        for i, row in enumerate(rows):
            single = model(row[None], labels=row[None], output_hidden_states=True)
            present = batch["attention_mask"][i] == 1
            close(output.logits[i, present], single.logits[0])
            for layer, unpadded in zip(hidden, single.hidden_states, strict=True):
                close(layer[i, present], unpadded[0])
            close(single.hidden_states[-1], model.megalodon.features(row[None]))
            total += single.loss * (len(row) - 1)
            cache = output.get(CACHE).state[[i]]
            for a, b in zip(
                torch.utils._pytree.tree_leaves(cache), torch.utils._pytree.tree_leaves(single.get(CACHE).state)
            ):
                close(a, b)
    close(output.loss, total / (sum(map(len, rows)) - len(rows)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_continue_padded_rows(side: str) -> None:
    """A conversation: the second turn is padded, too, with a mask over both turns or only its own columns."""
    model, first, second = build_model(), prompts(), [torch.randint(50, (length,)) for length in (2, 7, 5)]
    turns = padded(first, "left"), padded(second, side)
    for mask in (turns[1]["attention_mask"], torch.cat([turn["attention_mask"] for turn in turns], dim=1)):
        with torch.no_grad():
            cache = model(**turns[0]).get(CACHE)
            logits = model(turns[1]["input_ids"], attention_mask=mask, past_key_values=cache).logits
            for i, rows in enumerate(zip(first, second)):
                present = turns[1]["attention_mask"][i] == 1
                close(logits[i, present], model(torch.cat(rows)[None]).logits[0, -len(rows[1]) :])


@given(st.data())
def test_arbitrary_padding_and_splits_equal_single_runs(data: st.DataObject) -> None:
    """Rows padded on both sides, some empty, over calls of arbitrary widths, with and without a decoder."""
    torch.manual_seed(5)
    model = build_model(torch.float64)
    batch = data.draw(st.integers(1, 3))
    widths = data.draw(st.lists(st.integers(1, 19), min_size=1, max_size=4))
    cache, past = hf.MegalodonCache(), [[] for _ in range(batch)]
    with torch.no_grad() if data.draw(st.booleans()) else torch.enable_grad():
        for width in widths:
            ids, mask = torch.full((batch, width), -1), torch.zeros(batch, width, dtype=torch.long)
            for i in range(batch):
                begin = data.draw(st.integers(0, width - 1))
                end = data.draw(st.integers(begin + 1 if past[i] else begin, width))
                ids[i, begin:end], mask[i, begin:end] = torch.randint(50, (end - begin,)), 1
                past[i] += ids[i, begin:end].tolist()
            logits = model(ids, attention_mask=mask, past_key_values=cache).logits
            for i in range(batch):
                if new := int(mask[i].sum()):
                    expected = model.megalodon(torch.tensor([past[i]]))[0, -new:]
                    torch.testing.assert_close(logits[i, mask[i] == 1], expected, rtol=1e-9, atol=1e-9)
                    end = int(mask[i].nonzero().max())
                    torch.testing.assert_close(
                        logits[i, end:], logits[i, end].expand(width - end, -1), rtol=1e-9, atol=1e-9
                    )
    assert cache.get_seq_length() == sum(widths)


def test_wrong_masks() -> None:
    model, ids = build_model(), torch.randint(50, (2, 6))
    hole = torch.ones(2, 6, dtype=torch.long)
    hole[0, 2] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        model(ids, attention_mask=hole)
    with pytest.raises(ValueError, match="1 for a token and 0 for padding"):
        model(ids, attention_mask=hole * 2)
    with pytest.raises(ValueError, match=r"must be \(2, 6\), got \(2, 1, 6, 6\)"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6))
    cache = model(ids).get(CACHE)
    empty = torch.tensor([[0, 0], [1, 1]])
    with pytest.raises(ValueError, match="leave a token to every row that has begun"):
        model(ids[:, :2], attention_mask=empty, past_key_values=cache)
