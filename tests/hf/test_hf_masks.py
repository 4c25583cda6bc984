"""transformers: attention masks. Rows with padding give what they give without."""

import itertools

import pytest
import torch
from assertions import every_case
from hf_models import QUIET, VARIANTS, close, hf, build_model, padded, prompts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves

from megalodon_ops.hf.arguments import read_batch
from megalodon_ops.hf.cache import CACHE

pytestmark = QUIET


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_padded_rows_equal_single_runs(side: str, fields: dict) -> None:
    model, rows = build_model(**fields), prompts()
    batch = padded(rows, side, value=-1)
    with torch.no_grad():
        output = model(**batch, labels=batch["input_ids"])
        hidden = model(**batch, output_hidden_states=True).hidden_states
        assert len(hidden) == 3 and (hidden[-1][batch["attention_mask"] == 0] == 0).all()
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
            close(tree_leaves(cache), tree_leaves(single.get(CACHE).state))
    close(output.loss, total / (sum(map(len, rows)) - len(rows)))


def rows_with_holes(count: int = 3, width: int = 24) -> tuple[dict, dict, list[Tensor]]:
    """Rows with padding in arbitrary columns; the same rows without it, right-padded; and their tokens' columns."""
    ids = torch.randint(50, (count, width))
    mask = (torch.rand(count, width) < 0.6).long()
    mask[0] = 0
    mask[0, 5] = 1  # a row of one token
    columns = [row.nonzero()[:, 0] for row in mask]
    rows = [row[there] for row, there in zip(ids, columns)]
    return dict(input_ids=ids.masked_fill(mask == 0, -1), attention_mask=mask), padded(rows, "right"), columns


def results(model: hf.MegalodonForCausalLM, batch: dict, columns: list[Tensor], is_embedded: bool) -> list[Tensor]:
    """The loss, all gradients, the state, and what stands where the tokens stood: logits, hidden states, gradients."""
    ids = batch["input_ids"].clamp(min=0)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    given = dict(inputs_embeds=embeddings) if is_embedded else dict(input_ids=batch["input_ids"])
    mask = batch["attention_mask"]
    output = model(**given, attention_mask=mask, labels=ids, output_hidden_states=True, use_cache=True)
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    in_columns = [output.logits, *output.hidden_states]
    if is_embedded:
        in_columns.append(embeddings.grad)
        assert embeddings.grad[mask == 0].count_nonzero() == 0 < embeddings.grad.count_nonzero()
    rows = [tensor[i, there] for tensor in in_columns for i, there in enumerate(columns)]
    return [output.loss, *gradients, *tree_leaves(output.get(CACHE).state), *rows]


def test_rows_with_holes_have_the_bits_of_rows_without() -> None:
    with every_case() as case:
        for name, dtype in itertools.product(VARIANTS, (torch.float64, torch.float32, torch.bfloat16)):
            model = build_model(dtype, **VARIANTS[name])
            holes, dense, columns = rows_with_holes()
            for is_embedded in (False, True):
                with case(name, dtype, is_embedded):
                    found = results(model, holes, columns, is_embedded)
                    expected = results(model, dense, [torch.arange(len(there)) for there in columns], is_embedded)
                    assert len(found) == len(expected) > 20
                    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            with case(name, dtype, "a row by itself, which then has no padding at all"), torch.no_grad():
                row = {name: tensor[1:2] for name, tensor in holes.items()}
                found, expected = model(**row), model(row["input_ids"][:, columns[1]])
                assert torch.equal(found.logits[:, columns[1]], expected.logits)
                assert torch.equal(found.get(CACHE).state.norm.mean, expected.get(CACHE).state.norm.mean)


def test_padding_takes_no_time() -> None:
    """The layers read as many columns as the longest row has tokens."""
    model = build_model().train()
    holes, dense, _ = rows_with_holes()
    widths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    model(**holes)
    model(**dense)
    assert widths[0] == widths[1] == dense["input_ids"].shape[1] < 24


def masks(width: int) -> dict[str, Tensor]:
    """Masks of three rows (3, width) with padding on each side, on both, amid tokens and nowhere."""
    column = torch.arange(width)
    starts = torch.tensor([[0], [7], [width - 1]])
    ends = torch.tensor([[width], [width - 3], [9]])
    mixed = (column >= starts.clamp(max=8)) & (column < ends)
    found = dict(left=column >= starts, right=column < ends, mixed=mixed, holes=mixed & (column % 4 > 0))
    return {name: mask.long() for name, mask in found.items()} | {"none": torch.ones(3, width, dtype=torch.long)}


@pytest.mark.slow  # the compiler takes 3 s to start
def test_masks_compile() -> None:
    """One program serves all masks. It moves tokens only in rows with holes, behind the row's first token."""
    model, ids = build_model(num_layers=1), torch.randint(50, (3, 24))
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)

    @torch.compile(fullgraph=True, backend="eager")
    def read(mask: Tensor) -> tuple[Tensor, Tensor]:
        batch = read_batch(model, ids, mask)
        return batch.columns, batch.spans

    with every_case() as case, torch.no_grad():
        for name, mask in masks(24).items():
            with case(name):
                expected = model(ids, attention_mask=mask, labels=ids)
                found = compiled(ids, attention_mask=mask, labels=ids)
                close(found.logits[mask == 1], expected.logits[mask == 1])
                close(found.loss, expected.loss)
                longer = torch.nn.functional.pad(mask, (0, 1), value=1)
                next_token = dict(input_ids=ids[:, :1], attention_mask=longer)
                after = [model(**next_token, past_key_values=x.get(CACHE)).logits for x in (found, expected)]
                close(*after)
                columns, spans = read(mask)
                for row, (begin, end) in enumerate((spans - 24 * torch.arange(3)[:, None]).tolist()):
                    assert columns[row, begin:end].tolist() == mask[row].nonzero()[:, 0].tolist()
    assert graphs.frame_count == 1


@pytest.mark.slow  # the compiler
def test_generation_by_a_compiled_forward() -> None:
    """A program for the prompts and one for single tokens; both read no values, which a full graph could not."""
    model, graphs = build_model(num_layers=1), CompileCounter()
    batch = padded(prompts(), "left")
    expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=graphs)
    assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), expected)
    assert graphs.frame_count == 2
    packed = dict(position_ids=torch.arange(21).remainder(7)[None], use_cache=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must not be given with packed documents"):
        model(**padded(prompts(), "left"), **packed)


@given(st.data())
def test_arbitrary_padding_and_splits_equal_single_runs(data: st.DataObject) -> None:
    """Rows padded in arbitrary columns, some empty, over calls of arbitrary widths, with and without a decoder."""
    torch.manual_seed(5)
    model = build_model(torch.float64)
    batch = data.draw(st.integers(1, 3))
    widths = data.draw(st.lists(st.integers(1, 19), min_size=1, max_size=4))
    cache, past = hf.MegalodonCache(), [[] for _ in range(batch)]
    mask_over_past = torch.zeros(batch, 0, dtype=torch.long)
    with torch.no_grad() if data.draw(st.booleans()) else torch.enable_grad():
        for width in widths:
            ids = torch.randint(50, (batch, width))
            mask = torch.tensor([data.draw(st.lists(st.integers(0, 1), min_size=width, max_size=width)) for _ in ids])
            mask_over_past = torch.cat([mask_over_past, mask], dim=1)
            given = mask_over_past if data.draw(st.booleans()) else mask
            logits = model(ids.masked_fill(mask == 0, -1), attention_mask=given, past_key_values=cache).logits
            for i, columns in enumerate(row.nonzero()[:, 0].tolist() for row in mask):
                if not columns:
                    continue
                past[i] += ids[i, columns].tolist()
                expected = model.megalodon(torch.tensor([past[i]]))[0, -len(columns) :]
                torch.testing.assert_close(logits[i, columns], expected, rtol=1e-9, atol=1e-9)
                for begin, end in zip(columns, [*columns[1:], width]):  # padding repeats the token before it
                    assert torch.equal(logits[i, begin:end], logits[i, begin].expand(end - begin, -1))
    assert cache.get_seq_length() == sum(widths)


def test_wrong_masks() -> None:
    model, ids = build_model(), torch.randint(50, (2, 6))
    hole = torch.ones(2, 6, dtype=torch.long)
    hole[0, 2] = 0
    with pytest.raises(ValueError, match="1 for a token and 0 for padding"):
        model(ids, attention_mask=hole * 2)
    with pytest.raises(ValueError, match=r"must be \(2, 6\), got \(2, 1, 6, 6\)"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6))
    empty = torch.tensor([[0] * 6, [1] * 6])
    ends_early = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    for mask, options, columns in ((empty, {}, 6), (ends_early, dict(prefill_chunk_size=4), 2)):
        with pytest.raises(ValueError, match=f"a token in every row of the last {columns} columns"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, **options)
    restart = dict(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]))
    for positions in (restart, dict(seq_idx=torch.tensor([[0] * 3 + [1] * 3]))):
        with pytest.raises(ValueError, match="padding only before and after a row's documents"):
            model(ids[:1], attention_mask=hole[:1], **positions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hooks_see_the_columns_of_the_call(side) -> None:
    """A hook that adds a vector at each row's last token changes what it changes in the row alone."""
    model = build_model()
    width = 20
    rows = [torch.randint(50, (n,)) for n in (width, 7, 13)]
    batch = padded(rows, side)
    change = torch.randn(model.config.model_dim)
    lasts = [width - 1] * 3 if side == "left" else [len(row) - 1 for row in rows]
    seen = []

    def add(_, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x.shape[1])
        x = x.clone()
        x[range(len(x)), lasts[: len(x)]] += change
        return (x, *output[1:]) if isinstance(output, tuple) else x

    with torch.no_grad():
        model.model.layers[0].register_forward_hook(add)
        together = model(**batch).logits
        assert seen == [width]
        for row, (tokens, last) in enumerate(zip(rows, lasts[:], strict=True)):
            lasts[0] = len(tokens) - 1
            close(together[row, last], model(tokens[None]).logits[0, -1])
            lasts[0] = width - 1


@pytest.mark.parametrize("kind", [hf.MegalodonModel, hf.MegalodonEncoderModel])
def test_hidden_states_are_zero_at_padding(kind) -> None:
    """Their sum over columns is then over tokens. Padding is after, before and between tokens."""
    config = kind.config_class(num_layers=2, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=50)
    model, rows = kind(config).eval(), torch.randint(50, (2, 9))
    for padding in (slice(5, 9), slice(0, 3), slice(4, 6)):
        mask = torch.ones_like(rows)
        mask[1, padding] = 0
        found = model(rows, attention_mask=mask, output_hidden_states=True)
        assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
        assert (found.last_hidden_state[mask == 0] == 0).all()


@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e20])
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_at_padding_do_not_reach_results_or_gradients(side, padding) -> None:
    model, rows = build_model(), [torch.randint(50, (n,)) for n in (9, 4)]
    batch = padded(rows, side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = []
    outside = mask[..., None] == 0
    for value in (0.0, padding):
        embeddings = model.get_input_embeddings()(ids).detach().masked_fill(outside, value).requires_grad_()
        labels = ids.masked_fill(outside[..., 0], -100)
        loss = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss
        grads = torch.autograd.grad(loss, [embeddings, *model.model.layers.parameters()])
        assert (grads[0].masked_select(outside) == 0).all()
        found.append((loss, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
