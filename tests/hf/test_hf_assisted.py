"""transformers: an assistant and prompt lookup change how often a model is called, but no token."""

import copy
import functools

import pytest
import torch
from assertions import every_case
from hf_models import QUIET, VARIANTS, build_model, close, hf, padded

from megalodon_ops.hf.cache import CACHE

GREEDY = dict(do_sample=False, eos_token_id=49, pad_token_id=0)  # transformers 5.0 needs an end for prompt lookup
KINDS = {"bytes": VARIANTS["bytes"], "memory, two chunks": dict(working_memory=True, visible_chunks=2)}
pytestmark = QUIET


def near(model: hf.MegalodonForCausalLM) -> hf.MegalodonForCausalLM:
    """A copy that often chooses other tokens."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return other


def count_calls(model: hf.MegalodonForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A list to which each call of the model appends [its tokens, those of them that the decoder reads]."""
    calls = []
    forward, decode = model.forward, hf.MegalodonCache.decode

    @functools.wraps(forward)  # transformers reads its signature
    def counted(input_ids, **arguments):
        calls.append([input_ids.shape[1], 0])
        return forward(input_ids, **arguments)

    def counted_decode(cache, core, tokens, columns):
        if core is model.megalodon:
            calls[-1][1] = tokens.shape[1]
        return decode(cache, core, tokens, columns)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(hf.MegalodonCache, "decode", counted_decode)
    return calls


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
def test_tokens_are_those_without_help(fields: dict) -> None:
    """Over several chunks of 8 tokens, by drafts that are longer than one."""
    model, prompt = build_model(torch.float64, **fields), torch.randint(48, (1, 21))
    assistant = near(model)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    with every_case() as case:
        for name, options in {
            "the model": dict(assistant_model=model),
            "another": dict(assistant_model=assistant),
            "lookup": dict(prompt_lookup_num_tokens=4),
            "long lookup": dict(prompt_lookup_num_tokens=12, max_matching_ngram_size=1),
        }.items():
            with case(name):
                for length, count in ((21, 24), (1, 6), (2, 6)):
                    expected = model.generate(prompt[:, :length], max_new_tokens=count, **GREEDY)
                    found = model.generate(prompt[:, :length], max_new_tokens=count, **GREEDY, **options)
                    # transformers 5.0 looks up tokens beyond max_new_tokens
                    assert torch.equal(found if CACHE == "cache" else found[:, : length + count], expected)


def test_a_round_is_one_call_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = build_model(), torch.randint(48, (1, 21))
    right, other = copy.deepcopy(model), near(model)
    for assistant in (right, other):
        assistant.generation_config.num_assistant_tokens = 4
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
    calls = count_calls(model, monkeypatch)
    model.generate(prompt, max_new_tokens=20, do_sample=False, assistant_model=right)
    assert calls == [[21 + 4, 5]] + [[5, 5]] * 3  # each keeps four tokens and adds one
    calls.clear()
    model.generate(prompt, max_new_tokens=20, do_sample=False, assistant_model=other)
    assert 4 < len(calls) < 20 and all(read == tokens for tokens, read in calls[1:])


def test_a_returned_cache_goes_on_and_padding_is_skipped() -> None:
    model, rows = build_model(torch.float64), [torch.randint(48, (21,)), torch.randint(48, (13,))]
    batch = {name: x[1:] for name, x in padded(rows, "left").items()}
    expected = model.generate(rows[1][None], max_new_tokens=18, **GREEDY)
    for options in (dict(assistant_model=near(model)), dict(prompt_lookup_num_tokens=3)):
        first = model.generate(**batch, max_new_tokens=9, return_dict_in_generate=True, **GREEDY, **options)
        assert torch.equal(first.sequences[:, 8:], expected[:, :22])
        cache = first.get(CACHE)
        mask = torch.cat([batch["attention_mask"], torch.ones(1, 9, dtype=torch.long)], 1)
        assert cache.get_seq_length() == 29
        for past, more in ((copy.deepcopy(cache), {}), (cache, options)):
            given = dict(attention_mask=mask, max_new_tokens=9, **{CACHE: past}, **GREEDY, **more)
            rest = model.generate(first.sequences, **given)
            assert torch.equal(rest[:, 8:], expected)


def test_crop() -> None:
    """Its argument is the number of tokens to remove, as a negative number, or before 5.24 of tokens to keep."""
    model, ids = build_model(torch.float64), torch.randint(48, (1, 30))
    for argument, kept in ((-3, 17), (17, 17), (0, 20), (25, 20)):
        cache = hf.MegalodonCache()
        cache.renew(undo=4)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache, use_decoder=True, logits_to_keep=1)
            cache.crop(argument)
            assert cache.get_seq_length() == kept and cache.is_croppable
            found = model(ids[:, 20:22], past_key_values=cache, use_decoder=True).logits
            close(found, model(torch.cat([ids[:, :kept], ids[:, 20:22]], 1)).logits[:, -2:])
    plain = model(ids).get(CACHE)
    assert not plain.is_croppable
    plain.crop(0)
    with pytest.raises(NotImplementedError, match="`crop` must be called in assisted generation"):
        plain.crop(-1)


@pytest.mark.parametrize("mask", [slice(5, 20), slice(0, 15), slice(18, 20), slice(6, 14)], ids=str)
def test_crop_of_a_padded_row(mask: slice) -> None:
    """The layers and then the decoder read the columns where they are, with padding up to the decoder's."""
    model, ids = build_model(torch.float64), torch.randint(48, (2, 22))
    ids[1] = ids[0]
    undo = 4  # columns that the decoder reads, and may read again
    present = torch.zeros(2, 20, dtype=torch.long)
    present[:, mask] = 1
    tokens = ids[:, [*range(20)][mask]]
    expected = model(torch.cat([tokens[:, :-1], ids[:, 20:]], 1)).logits[:, -2:]
    for keep in (0, 1):
        cache = hf.MegalodonCache()
        seen = []  # widths of the pieces that the layers read
        cache.renew(undo)
        hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        with torch.no_grad(), pytest.warns(UserWarning, match="hooked"):
            options = dict(past_key_values=cache, use_decoder=True)
            logits = model(ids[:, :20], attention_mask=present, logits_to_keep=keep, **options).logits
            hook.remove()
            found = logits if keep else logits[:, mask]
            close(found, model(tokens).logits[:, -found.shape[1] :])
            begin = max(mask.stop - undo - 1, mask.start) if keep else mask.start
            assert seen == [begin] * (begin > mask.start) + [mask.stop - begin]
            cache.crop(-1)
            close(model(ids[:, 20:], **options).logits, expected)


def test_hidden_states_are_those_without_help() -> None:
    """The assistant computes hidden states, too."""
    model, prompt = build_model(torch.float64), torch.randint(48, (1, 21))
    wanted = dict(max_new_tokens=12, output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
    expected = model.generate(prompt, **wanted)
    for options in (dict(assistant_model=near(model)), dict(prompt_lookup_num_tokens=3)):
        found = model.generate(prompt, **wanted, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for step, (states, others) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
            if step != 1:  # with an assistant, transformers gives the second token the first one's, also for Llama
                for state, other in zip(states, others, strict=True):
                    close(state, other)
