"""A model's state: selecting, joining and resetting sequences, moving, files."""

import copy
import io
import json
import os
import pickle
import re
from dataclasses import FrozenInstanceError, replace

import megalodon_ops as mo
import numpy as np
import pytest
import torch
from decoding import assert_equal
from megalodon_ops.model.model_state import layout, named_tensors
from models import TINY, tiny_model, tokens_of
from torch.utils._pytree import tree_leaves, tree_map_only


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@pytest.fixture(scope="module")
def state(model):
    """Of three sequences of 5, 8 and 11 tokens: before, at and after the end of a chunk."""
    with torch.no_grad():
        return model(tokens_of(3, 11), lengths=torch.tensor([5, 8, 11]), return_state=True)[1]


def next_logits(model, state, tokens):
    with torch.no_grad():
        return model(tokens, state=state)


def is_close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-12)


ROWS = {
    "an integer": (1, [1]),
    "an integer from the end": (-1, [2]),
    "slice": (slice(1, None), [1, 2]),
    "backwards": ([2, 1, 0], [2, 1, 0]),
    "repeated": ([1, 1, 1, 0], [1, 1, 1, 0]),
    "range": (range(2), [0, 1]),
    "from the end": ([-1], [2]),
    "backwards slice": (slice(None, None, -1), [2, 1, 0]),
    "NumPy's integers": ([np.int64(1), np.int32(-1)], [1, 2]),
    "uint8": (torch.tensor([2, 0], dtype=torch.uint8), [2, 0]),
    "int32": (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
    "bools": (torch.tensor([True, False, True]), [0, 2]),
    "none": ([], []),
}


@pytest.mark.parametrize("rows, wanted", ROWS.values(), ids=ROWS)
def test_rows_of_a_state_continue_as_those_rows(model, state, rows, wanted):
    more = tokens_of(3, 6)
    selected = state[rows]
    assert selected.num_sequences == len(wanted)
    assert is_close(next_logits(model, selected, more[wanted]), next_logits(model, state, more)[wanted])


@pytest.mark.parametrize(
    "rows, error, match",
    [
        (True, TypeError, "slice"),
        ([True], TypeError, "list of integers"),
        ([0.0], TypeError, "list of integers"),
        ("0", TypeError, "slice"),
        (torch.tensor([0.0]), TypeError, "integers or bools"),
        (torch.tensor([[0]]), ValueError, "1-D"),
        (torch.tensor([True]), ValueError, r"\(3,\)"),
        ([3], IndexError, r"\[-3, 3\)"),
        (3, IndexError, r"\[-3, 3\)"),
        (torch.tensor([200], dtype=torch.uint8), IndexError, r"\[-3, 3\)"),
        ([-4], IndexError, r"\[-3, 3\)"),
    ],
)
def test_wrong_rows_are_refused(state, rows, error, match):
    for function in (state.__getitem__, state.reset):
        with pytest.raises(error, match=f"MegalodonState: `rows` must be .*{match}"):
            function(rows)


def test_a_state_is_no_sequence_and_prints_one_line(state):
    """Its fields were once the items of a tuple: `layers, norm, inputs = state` must not select three sequences."""
    for function in (len, iter, tuple):
        with pytest.raises(TypeError):
            function(state)
    with pytest.raises(FrozenInstanceError):
        state.norm = None
    shown = repr(state)
    assert shown.startswith("MegalodonState(3 sequences, 2 layers, torch.float64") and len(shown) < 120, shown
    assert "\n" not in shown


def test_reset_rows_begin_a_new_document_and_the_others_continue(model, state):
    more = tokens_of(3, 6)
    logits = next_logits(model, state.reset([1]), more)
    assert is_close(logits[1:2], model(more[1:2]))
    kept = torch.tensor([0, 2])
    assert is_close(logits[kept], next_logits(model, state, more)[kept])


def test_fresh_is_the_state_before_the_first_token(model):
    tokens = tokens_of(2, 9)
    fresh = mo.MegalodonState.fresh(model.config, 2, dtype=torch.float64)
    assert is_close(next_logits(model, fresh, tokens), model(tokens))


def test_cat_joins_selected_rows(model, state):
    assert_equal(mo.MegalodonState.cat([state[[0]], state[1:]]), state)
    without_residual = replace(state, norm=state.norm._replace(residual=None))
    assert mo.MegalodonState.cat([without_residual, state]).num_sequences == 6


def test_cat_refuses_states_that_do_not_belong_together(state):
    other = mo.MegalodonState.fresh(mo.MegalodonConfig(**{**TINY, "cema_ndim": 5}), 1, dtype=torch.float64)
    fewer = mo.MegalodonState.fresh(mo.MegalodonConfig(**{**TINY, "num_layers": 1}), 1, dtype=torch.float64)
    for states, error in (
        ([state, other], "cema"),
        ([state, fewer], "and None as layers.1"),
        ([state, state.to(torch.float32)], "float32"),
    ):
        with pytest.raises(ValueError, match=f"MegalodonState.cat: `states` must be of one model.*{error}"):
            mo.MegalodonState.cat(states)
    for states in ([], [state, None]):
        with pytest.raises(TypeError, match="MegalodonState.cat: `states` must be"):
            mo.MegalodonState.cat(states)


def test_only_a_detached_state_shares_memory(state):
    def memory(one):
        return {tensor.data_ptr() for tensor in tree_leaves(one)}

    for other in (state.clone(), state[:], state.reset([]), mo.MegalodonState.cat([state])):
        assert not memory(other) & memory(state)
        assert_equal(other, state)
    assert memory(state.detach()) == memory(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_a_dtype_gives_the_state_that_a_model_of_that_dtype_takes(model, state, dtype):
    moved = state.to(dtype)
    assert_equal(moved, state.to(dtype=dtype))
    wanted = {name: kind for name, kind, _ in layout(model.config, 3, dtype)}
    for name, tensor in named_tensors(moved).items():
        assert (torch.float32 if tensor.is_complex() else tensor.dtype) == wanted[name]
    logits = next_logits(copy.deepcopy(model).to(dtype), moved, tokens_of(3, 6))
    error = (logits - next_logits(model, state, tokens_of(3, 6))).abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 0.3)


def test_to_a_device_moves_every_tensor(state):
    assert {tensor.device.type for tensor in tree_leaves(state.to("meta"))} == {"meta"}
    assert state.to("meta", torch.float32).layers[0].attention.k.dtype == torch.float32
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="MegalodonState.to: `dtype` must be"):
            state.to(dtype)


def test_nbytes_counts_every_tensor(model, state):
    sizes = [torch.Size(shape).numel() * kind.itemsize for _, kind, shape in layout(model.config, 3, torch.float64)]
    assert state.nbytes == sum(sizes)


def test_gradients_flow_through_rows_cat_and_clone(model):
    _, state = model(tokens_of(2, 5), return_state=True)
    swapped = mo.MegalodonState.cat([state[[1]], state[[0]]]).clone()
    model(tokens_of(2, 3), state=swapped).sum().backward()
    other = tiny_model().eval()
    _, state = other(tokens_of(2, 5), return_state=True)
    other(tokens_of(2, 3).flip(0), state=state).flip(0).sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)
    model.zero_grad()


def test_a_state_is_a_pytree_of_tensors_that_pickles(state):
    assert_equal(tree_map_only(torch.Tensor, lambda tensor: tensor, state), state)
    assert_equal(pickle.loads(pickle.dumps(state)), state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert isinstance(loaded, mo.MegalodonState)
    assert_equal(loaded, state)


@pytest.mark.slow
def test_a_compiled_model_takes_and_returns_states(model, state):
    compiled = torch.compile(lambda tokens, past: model(tokens, state=past, return_state=True), backend="aot_eager")
    logits, after = compiled(tokens_of(3, 6), state)
    assert isinstance(after, mo.MegalodonState)
    assert is_close(logits, next_logits(model, state, tokens_of(3, 6)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_file_restores_the_state_bit_for_bit(tmp_path, model, state, dtype):
    saved = state.to(dtype)
    saved.save(tmp_path / "state.safetensors", model.config)
    loaded = mo.MegalodonState.load(str(tmp_path / "state.safetensors"), model.config)
    assert isinstance(loaded, mo.MegalodonState)
    assert_equal(loaded, saved)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_model_with_other_dropout_takes_the_state(tmp_path, model, state):
    state.save(tmp_path / "state", model.config)
    mo.MegalodonState.load(tmp_path / "state", replace(model.config, dropout=0.1, layerwise_ckpt=True))


def test_a_state_of_another_configuration_is_refused(tmp_path, model, state):
    state.save(tmp_path / "state", model.config)
    with pytest.raises(ValueError, match="of another configuration: its `norm_eps` is 1e-05, the model's 1e-06"):
        mo.MegalodonState.load(tmp_path / "state", replace(model.config, norm_eps=1e-6))
    with pytest.raises(ValueError, match=r"MegalodonState.save: the state is not one of `config`: .*'layers.0.cema'"):
        state.save(tmp_path / "other", replace(model.config, cema_ndim=5))
    assert not (tmp_path / "other").exists()


SPOILED = {
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "must be a file, got a folder"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-8]), ""),
    "no safetensors": (lambda path: path.write_bytes(b"PK" * 100), ""),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "huge": (lambda path: os.truncate(path, 1 << 43), "the state takes 8,192.0 GiB of memory"),  # the disk holds little
}


@pytest.mark.parametrize("spoil, match", SPOILED.values(), ids=SPOILED)
def test_the_error_of_a_faulty_file_is_one_line_with_its_path(tmp_path, model, state, spoil, match):
    path = tmp_path / "state"
    state.save(path, model.config)
    spoil(path)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ": " + match) as error:
        mo.MegalodonState.load(path, model.config)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mo.MegalodonState.load(tmp_path / "nowhere", model.config)


@pytest.mark.parametrize(
    "name, spoil, match",
    [
        ("norm.mean", lambda t: t.mul_(float("nan")), "`norm.mean` must be finite"),
        ("layers.0.attention.position", lambda t: t.fill_(8), r"must be in \[0, 8\)"),
        ("layers.1.norm.count", lambda t: t.fill_(-1), r"must be in \[0, inf\)"),
        ("layers.1.norm.var", lambda t: t.fill_(-1), r"must be in \[0, inf\)"),
        ("layers.1.cema", lambda t: t.resize_(3, 32, 4, 1), r"must be \(torch.float64"),
        ("layers.1.cema", None, "'layers.1.cema' must be .* got None"),
    ],
)
def test_values_that_no_state_holds_are_refused(tmp_path, model, state, name, spoil, match):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "state"
    state.save(path, model.config)
    tensors, metadata = safetensors.load_file(path), read_metadata(path)
    if spoil is None:
        del tensors[name]
    else:
        spoil(tensors[name])
    safetensors.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=match):
        mo.MegalodonState.load(path, model.config)


def test_a_state_with_nan_is_not_written_over_a_good_one(tmp_path, model, state):
    path = tmp_path / "state"
    state.save(path, model.config)
    before = path.read_bytes()
    spoiled = replace(state, norm=state.norm._replace(mean=state.norm.mean * float("nan")))
    with pytest.raises(ValueError, match=r"MegalodonState.save: .*`norm.mean` must be finite"):
        spoiled.save(path, model.config)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("change", [{"version": "2"}, {"format": "pt"}, {"config": "{}"}])
def test_another_version_or_format_is_refused(tmp_path, model, state, change):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "state"
    state.save(path, model.config)
    safetensors.save_file(safetensors.load_file(path), path, metadata=read_metadata(path) | change)
    with pytest.raises(ValueError, match=f"{path}: (its version|must be a file of|is the state of another)"):
        mo.MegalodonState.load(path, model.config)


def read_metadata(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
