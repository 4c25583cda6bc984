"""transformers: generation by all sampling methods, its cache and its decoder."""

import copy
import pickle

import pytest
import torch
from assertions import every_case
from hf_models import QUIET, VARIANTS, close, hf, build_model, padded, prompts, transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import megalodon_ops as mo
from megalodon_ops.hf.cache import CACHE

pytestmark = QUIET


MODELS = {**VARIANTS, "bfloat16": dict(dtype=torch.bfloat16)}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_greedy_generation_equals_ours(fields: dict) -> None:
    model, prompt = build_model(**fields), torch.randint(50, (2, 21))
    expected = model.megalodon.generate(prompt, max_new_tokens=20, temperature=0.0)
    for options in ({}, dict(use_cache=False)) if "dtype" not in fields else ({},):
        assert torch.equal(model.generate(prompt, max_new_tokens=20, do_sample=False, **options), expected)


def test_sampling_uses_the_models_logits() -> None:
    model, prompt = build_model(**VARIANTS["bytes"]), torch.randint(50, (2, 9))
    outputs = dict(return_dict_in_generate=True, output_logits=True, output_scores=True)
    output = model.generate(prompt, max_new_tokens=12, do_sample=True, top_k=0, temperature=0.7, **outputs)
    with torch.no_grad():
        logits = model.megalodon(output.sequences)[:, 8:-1]
    close(torch.stack(output.logits, 1)[..., :50], logits)
    close(torch.stack(output.scores, 1)[..., :50], logits / 0.7)
    assert output.sequences.max() < 50


def with_hole(batch: dict[str, Tensor], column: int, width: int, value: int = 0) -> dict[str, Tensor]:
    """Insert columns of padding, amid some rows."""
    return {
        name: torch.cat([rows[:, :column], torch.full((len(rows), width), fill), rows[:, column:]], dim=1)
        for (name, rows), fill in zip(batch.items(), (value, 0), strict=True)
    }


PADDINGS = {
    "left": lambda rows: padded(rows, "left"),
    "right": lambda rows: padded(rows, "right"),
    "left and between": lambda rows: with_hole(with_hole(padded(rows, "left"), 19, 2), 9, 7),
}


@pytest.mark.parametrize("side", PADDINGS)
def test_rows_of_a_padded_batch_generate_as_single_rows(side: str) -> None:
    model, rows = build_model(), prompts()
    batch, greedy = PADDINGS[side](rows), dict(max_new_tokens=12, do_sample=False)
    width = batch["input_ids"].shape[1]
    kinds = {"greedy": {}, "without cache": dict(use_cache=False), "beams": dict(num_beams=3)}
    if side != "right":  # rows would end before the last piece
        kinds["in pieces"] = dict(prefill_chunk_size=5)  # a piece may have no token of a row that has begun
        kinds["in pieces, with a cache"] = kinds["in pieces"] | dict(past_key_values=hf.MegalodonCache())
    with every_case() as case:
        for kind, options in kinds.items():
            with case(kind):
                together = model.generate(**batch, **greedy, pad_token_id=0, **options)
                for i, row in enumerate(rows):
                    single = model.generate(row[None], **greedy, num_beams=options.get("num_beams", 1))
                    assert torch.equal(together[i, width:], single[0, len(row) :])


def test_padding_amid_a_prompt_is_found_without_a_mask() -> None:
    """transformers takes each `pad_token_id` for padding, wherever it stands."""
    model = build_model(eos_token_id=49)
    rows, options = [row.clamp(1, 48) for row in prompts()], dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    ids = with_hole(padded(rows, "left"), 19, 2)["input_ids"]
    together = model.generate(ids, pad_token_id=0, **options)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 23:], model.generate(row[None], **options)[0, len(row) :])


def test_generation_continues_after_a_past_with_holes() -> None:
    """A second call of `generate` extends the mask and gives the tokens of one call; so does a padded second turn."""
    model, rows = build_model(), prompts()
    batch, greedy = PADDINGS["left and between"](rows), dict(do_sample=False, pad_token_id=0)
    whole = model.generate(**batch, max_new_tokens=12, **greedy)
    first = model.generate(**batch, max_new_tokens=5, return_dict_in_generate=True, **greedy)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=1)
    cache = first.get(CACHE)
    again = copy.deepcopy(cache)
    rest = model.generate(first.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=7, **greedy)
    assert torch.equal(rest, whole)
    turns = [torch.randint(50, (length,)) for length in (2, 7, 5)]
    turn = with_hole(padded(turns, "left"), 5, 3)
    ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
    mask = torch.cat([mask, turn["attention_mask"]], dim=1)
    answers = model.generate(ids, attention_mask=mask, past_key_values=again, max_new_tokens=6, **greedy)
    for i, row in enumerate(rows):
        text = torch.cat([row, first.sequences[i, batch["input_ids"].shape[1] :], turns[i]])[None]
        expected = model.generate(text, max_new_tokens=6, do_sample=False)[0, text.shape[1] :]
        assert torch.equal(answers[i, ids.shape[1] :], expected)


def test_generation_from_embeddings() -> None:
    """Also where embeddings of virtual tokens stand before left-padded text, as in prompt tuning."""
    model, rows = build_model(**VARIANTS["released"]), prompts()
    batch, greedy = padded(rows, "left"), dict(max_new_tokens=9, do_sample=False)
    expected = model.generate(**batch, **greedy)[:, 21:]
    embeddings, mask = model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **greedy), expected)
    virtual = torch.randn(1, 4, 32)
    given = torch.cat([virtual.expand(3, -1, -1), embeddings], dim=1)
    mask = torch.cat([torch.ones(3, 4, dtype=torch.long), mask], dim=1)
    found = model.generate(inputs_embeds=given, attention_mask=mask, **greedy)
    for i, row in enumerate(rows):
        single = torch.cat([virtual, embeddings[i : i + 1, 21 - len(row) :]], dim=1)
        assert torch.equal(found[i], model.generate(inputs_embeds=single, **greedy)[0])


def test_beam_search_finds_the_likeliest_sequence() -> None:
    """With as many beams as tokens, beam search finds the likeliest pair of tokens."""
    model = build_model(vocab_size=6)
    prompt = torch.randint(6, (1, 11))
    options = dict(num_beams=6, do_sample=False, return_dict_in_generate=True, output_scores=True)
    output = model.generate(prompt, max_new_tokens=2, **options)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    with torch.no_grad():
        scores = model.megalodon(torch.cat([prompt.expand(36, -1), pairs], dim=1)).log_softmax(-1)
    scores = scores[:, 10].gather(1, pairs[:, :1]) + scores[:, 11].gather(1, pairs[:, 1:])
    assert torch.equal(output.sequences[0, 11:], pairs[scores.argmax()])
    close(output.sequences_scores[0], scores.max() / 2)


def test_several_samples_and_options() -> None:
    model, prompt = build_model(), torch.randint(50, (2, 9))
    samples = model.generate(prompt, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert samples.shape == (6, 13) and torch.equal(samples[:3, :9], prompt[:1].expand(3, -1))
    beams = model.generate(prompt, max_new_tokens=4, do_sample=True, num_beams=2, repetition_penalty=1.2, top_p=0.9)
    assert beams.shape == (2, 13)
    stopped = model.generate(prompt[:1], max_new_tokens=30, do_sample=False)
    end = stopped[0, 15].item()
    again = model.generate(prompt[:1], max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert torch.equal(again[0], stopped[0, : again.shape[1]]) and again[0, -1] == end and again.shape[1] <= 16


def test_generation_continues_with_a_cache() -> None:
    model, prompt = build_model(), torch.randint(50, (2, 9))
    whole = model.generate(prompt, max_new_tokens=12, do_sample=False)
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = first.get(CACHE)
    assert cache.get_seq_length() == 13  # the last token has not been read
    for past in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        rest = model.generate(first.sequences, past_key_values=past, max_new_tokens=7, do_sample=False)
        assert torch.equal(rest, whole)
    _, state = model.megalodon(prompt[:, :8], return_state=True)
    rest = model.generate(prompt, past_key_values=hf.MegalodonCache(state), max_new_tokens=12, do_sample=False)
    assert torch.equal(rest, whole)
    for tokens in (whole[:, :15], whole[:, :20]):  # the cache has read 20
        with pytest.raises(ValueError, match=f"has read 20 tokens, got {tokens.shape[1]}"):
            model.generate(tokens, past_key_values=cache, max_new_tokens=7)
    if CACHE == "cache":  # older transformers fail: the new token, with a mask over past and new tokens
        greedy = dict(max_new_tokens=3, do_sample=False)
        expected = model.generate(whole, **greedy)
        mask = torch.ones(2, 21, dtype=torch.long)
        rest = model.generate(whole[:, 20:], attention_mask=mask, past_key_values=cache, **greedy)
        assert torch.equal(rest[:, 1:], expected[:, 21:])
    with pytest.raises(ValueError, match="must have at least one token"):
        model(prompt[:, :0], past_key_values=cache)


def test_unsupported_generation() -> None:
    model, prompt = build_model(), torch.randint(50, (1, 9))
    for options, message in (
        (dict(penalty_alpha=0.6, top_k=4, do_sample=False), "Contrastive Search"),
        (dict(past_key_values=transformers.StaticCache(model.config, max_cache_len=9)), "cache"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model.generate(prompt, max_new_tokens=3, **options)
    plain = dict(max_new_tokens=3, do_sample=False)
    for kind in ("static", "quantized"):  # kinds of caches, which transformers ignores with a warning
        assert torch.equal(model.generate(prompt, **plain, cache_implementation=kind), model.generate(prompt, **plain))


def test_long_prompts_are_read_in_pieces(monkeypatch) -> None:
    """With gradients or hooks, they are read whole."""
    model, ids = build_model(), torch.randint(50, (2, 50))
    hidden = mo.Megalodon._hidden
    lengths = []

    def noted(model, x, *arguments, **options):
        lengths.append(x.shape[1])
        return hidden(model, x, *arguments, **options)

    monkeypatch.setattr(mo.Megalodon, "_hidden", noted)
    with torch.no_grad():
        pieces = model(ids)
        kept = model(**padded([ids[0], ids[1, :7]], "left"), logits_to_keep=9)
        assert max(lengths) == 8
        seen = []
        with model.model.layers[1].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1])):
            close(model(ids).logits, pieces.logits)
    assert seen == [50] and lengths.count(50) == 1
    close(pieces.logits, model(ids).logits)
    assert lengths.count(50) == 2
    close(kept.logits[0], pieces.logits[0, -9:])
    close(kept.logits[1, -7:], pieces.logits[1, :7])


def decoding_cache(model: hf.MegalodonForCausalLM, ids: Tensor) -> hf.MegalodonCache:
    with torch.no_grad():
        cache = model(ids, use_cache=True).get(CACHE)
        model(ids[:, :1], past_key_values=cache, use_decoder=True)
    assert cache._decoder.fused
    return cache


def test_one_decoder_serves_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    decoders = []

    def new_decoder(*arguments, undo):
        decoders.append(mo.Decoder(*arguments))
        return decoders[-1]

    monkeypatch.setattr("megalodon_ops.hf.cache.Decoder", new_decoder)
    model.generate(torch.randint(50, (2, 9)), max_new_tokens=9, do_sample=False)
    model.generate(torch.randint(50, (2, 9)), max_new_tokens=9, num_beams=4, do_sample=False)
    assert [decoder.fused for decoder in decoders] == [True, True]


def test_cache_changes_rows() -> None:
    model, ids = build_model(), torch.randint(50, (3, 13))
    token = torch.randint(50, (3, 1))
    for has_decoder in (False, True):
        with torch.no_grad():
            read = torch.cat([ids, ids[:, :1]], 1) if has_decoder else ids
            singles = [model(row[None], use_cache=True).get(CACHE) for row in read]

            def cache() -> hf.MegalodonCache:
                return decoding_cache(model, ids) if has_decoder else model(ids).get(CACHE)

            def check(method: str, argument: Tensor | int, rows: list[int]) -> None:
                """After the method, the cache has the rows `rows`."""
                changed = cache()
                getattr(changed, method)(argument)
                assert changed.batch_size == len(rows)
                logits = model(token[rows], past_key_values=changed).logits
                for i, row in enumerate(rows):
                    close(logits[i], model(token[[row]], past_key_values=copy.deepcopy(singles[row])).logits[0])

            check("reorder_cache", torch.tensor([0, 1, 2]), [0, 1, 2])
            check("reorder_cache", torch.tensor([2, 2, 0]), [2, 2, 0])
            check("batch_select_indices", torch.tensor([2, 0]), [2, 0])
            check("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2])
            part = hf.MegalodonCache(cache().state.reset([1]))
            close(model(token, past_key_values=part).logits[1], model(token[[1]]).logits[0])
            whole = cache()
            whole.reset()
            assert whole.get_seq_length() == 0 and not whole.is_initialized
            close(model(ids[:2], past_key_values=whole).logits, model(ids[:2]).logits)


@given(st.data())
def test_decoder_reorders_in_place(data: st.DataObject) -> None:
    """Arbitrary tokens and orders, across chunk bounds, give the bits of new decoders of the chosen rows."""
    torch.manual_seed(5)
    model, batch = build_model(), data.draw(st.integers(1, 4))
    ids = torch.randint(50, (batch, 13))
    ids = ids[:1].expand(batch, -1) if data.draw(st.booleans()) else ids
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 13), min_size=batch, max_size=batch)))
    with torch.no_grad():
        _, state = model.megalodon(ids, lengths=lengths, return_state=True)
    decoder = mo.Decoder(model.megalodon, state)
    for _ in range(data.draw(st.integers(1, 6))):
        rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
        tokens = torch.randint(50, (batch, data.draw(st.integers(1, 5))))
        expected = mo.Decoder(model.megalodon, decoder.state[rows])
        decoder.reorder(rows)
        assert torch.equal(decoder(tokens), expected(tokens))
    with pytest.raises(ValueError, match=rf"int64 or int32 \({batch},\)"):
        decoder.reorder(rows[None])


def test_calls_outside_generate_see_changes_of_the_model() -> None:
    model, ids = build_model(), torch.randint(50, (2, 13))
    token = ids[:, :1]

    def check(cache: hf.MegalodonCache) -> None:
        before = cache.state
        with torch.no_grad():
            close(model(token, past_key_values=cache).logits, model.megalodon(token, state=before))

    with torch.no_grad():
        cache = decoding_cache(model, ids)
        model.model.layers[0].mega.cema.alpha.add_(1.0)
        check(cache)
        alpha = model.model.layers[0].mega.cema.alpha
        alpha.data = alpha.data * 2
        check(cache)
        other = build_model(share_emb=True)
        before = cache.state
        close(other(token, past_key_values=cache).logits, other.megalodon(token, state=before))
        check(cache)
        model.model.layers[1].mega.wz = torch.nn.Linear(32, 16)
        check(cache)


def test_gradients_flow_through_a_cache_until_it_is_detached() -> None:
    model, ids = build_model(), torch.randint(50, (1, 30))
    embeddings = model.model.embed(ids[:, :20]).detach().requires_grad_()
    cache = model(inputs_embeds=embeddings, use_cache=True).get(CACHE)
    detached = hf.MegalodonCache(cache.state.detach())
    model(ids[:, 20:], past_key_values=detached).logits.sum().backward()
    assert embeddings.grad is None
    model(ids[:, 20:], past_key_values=cache).logits.sum().backward()
    assert embeddings.grad.abs().max() > 0


def test_generate_batch_is_refused_by_name():
    model = build_model().eval()
    message = "MegalodonForCausalLM: `generate_batch` must have a paged cache of keys"
    for call in (lambda: model.generate_batch([[1, 2, 3]], max_new_tokens=2), model.init_continuous_batching):
        with pytest.raises(NotImplementedError, match=message):
            call()


def test_layers_that_are_cut_or_stacked() -> None:
    """With the configuration's number of layers set before, after or not at all, as for other models."""
    model, prompt = build_model(), torch.randint(48, (2, 11))
    whole = copy.deepcopy(model.model.layers)
    for count in (1, 4):
        layers = nn.ModuleList(copy.deepcopy(whole[i % len(whole)]) for i in range(count))
        model.model.layers = layers
        tokens = model.generate(prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens[:, -1], model(tokens[:, :-1]).logits[:, -1].argmax(-1))
        model.config.num_hidden_layers = count
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), tokens)


def test_an_exported_program_takes_any_length() -> None:
    model = build_model()
    shapes = {"input_ids": {1: torch.export.Dim("length", max=1024)}, "use_cache": None}
    with torch.no_grad():
        example = dict(input_ids=torch.randint(48, (1, 21)), use_cache=False)
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False).module()
        for length in (2, 8, 37):
            ids = torch.randint(48, (1, length))
            close(program(input_ids=ids, use_cache=False)["logits"], model(ids, use_cache=False).logits)
