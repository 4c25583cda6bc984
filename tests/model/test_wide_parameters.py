"""Parameters that stay float32 in 16-bit models, and errors of wrong calls that say why."""

import copy
from functools import partial

import pytest
import torch
from assertions import assert_refuses, every_case
from models import TINY, tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.ops.layer_norm.layer_norm import layer_norm, rms_norm

HALF_DTYPES = [torch.bfloat16, torch.float16]


def assert_wide_and_runs(model, dtype):
    wide = mo.wide_parameters(model)
    assert len(wide) > 10 and all(parameter.dtype == torch.float32 for parameter in wide.values())
    for name, parameter in model.named_parameters():
        assert name in wide or parameter.dtype == dtype
        assert parameter is model.get_parameter(name)
    model.loss(tokens_of(1, 9), tokens_of(1, 9)).backward()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_cast_keeps_them_wide(dtype):
    assert_wide_and_runs(tiny_model(torch.float32, rescale_nffn=True).to(dtype), dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_16_bit_default_dtype_makes_them_wide(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = mo.Megalodon(mo.MegalodonConfig(**TINY))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_wide_and_runs(model, dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_an_assigned_16_bit_checkpoint_becomes_wide(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in tiny_model(torch.float32).state_dict().items()}
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig(**TINY))
    model.load_state_dict(weights, assign=True)
    assert_wide_and_runs(model, dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype))


def test_a_parameter_set_as_an_attribute_becomes_wide_and_keeps_requires_grad():
    norm = mo.TimestepNorm(8, num_groups=2)
    norm.weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
    assert norm.weight.dtype == torch.float32 and not norm.weight.requires_grad
    assert copy.deepcopy(norm).weight.dtype == torch.float32


def test_the_error_of_a_16_bit_parameter_names_wide_parameters():
    model = tiny_model(torch.float32).to(torch.bfloat16)
    norm = model.layers[0].mega.timenorm
    norm._parameters["weight"] = torch.nn.Parameter(norm.weight.detach().bfloat16())
    with pytest.raises(TypeError, match=r"timestep_norm: `weight` must be torch.float32 .*wide_parameters\(model\)"):
        model(tokens_of(1, 5))


def test_torch_func_is_refused():
    zeros = torch.zeros(2, 8)
    with pytest.raises(NotImplementedError, match="timestep_norm: .*torch.func"):
        torch.func.grad(lambda x: mo.timestep_norm(x, *zeros, num_groups=2).sum())(torch.randn(1, 4, 8))


@pytest.mark.parametrize("token", [-1, TINY["vocab_size"], 2**40])
def test_a_token_out_of_range_is_named(token):
    model, tokens = tiny_model(torch.float32), tokens_of(2, 5)
    tokens[1, 2] = token
    with pytest.raises(IndexError, match=rf"Megalodon: `tokens` must be in \[0, {TINY['vocab_size']}\), got {token}"):
        model(tokens)


@pytest.mark.parametrize(
    "tokens", [[[1, 2]], None, torch.ones(1, 2, dtype=torch.bool), torch.ones(2, dtype=torch.long)]
)
def test_tokens_of_a_wrong_kind_are_refused(tokens):
    assert_refuses((TypeError, ValueError), "Megalodon", "tokens", lambda: tiny_model(torch.float32)(tokens))


def test_states_must_be_whole_and_of_their_ops():
    q, x, zeros = torch.randn(1, 5, 1, 4), torch.randn(1, 5, 4), torch.zeros(2, 4)
    ops = {
        "chunked_attention": partial(mo.chunked_attention, q, q, q, chunk_size=4),
        "timestep_norm": partial(mo.timestep_norm, x, *zeros, num_groups=2),
    }
    with every_case() as case:
        for name, op in ops.items():
            _, state = op(return_state=True)
            for field in state._fields[:3]:
                with case(name, field):
                    broken = state._replace(**{field: None})
                    assert_refuses(ValueError, name, f"state.{field}", lambda: op(state=broken))  # noqa: B023
            for wrong in ((), (1,), [1, 2, 3], {"count": 1}, 5, "state"):
                with case(name, wrong):
                    assert_refuses(TypeError, name, "state", lambda: op(state=wrong))  # noqa: B023


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_norms_of_integers_are_refused(norm):
    assert_refuses(TypeError, norm.__name__, "x", lambda: norm(torch.ones(2, 4, dtype=torch.int64)))


def shard(model, shard_all_in_bfloat16):
    """Shard a model on one rank."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if shard_all_in_bfloat16:
        fully_shard(model, mesh=mesh, mp_policy=policy)
    else:  # as wide_parameters' docstring says
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


@pytest.fixture
def one_rank(tmp_path):
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_they_stay_wide_when_sharded_in_bfloat16(one_rank):
    model = tiny_model(torch.float32)
    wanted = copy.deepcopy(model).to(torch.bfloat16).loss(tokens_of(2, 20), tokens_of(2, 20))
    shard(model, shard_all_in_bfloat16=False)
    loss = model.loss(tokens_of(2, 20), tokens_of(2, 20))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_the_error_of_sharding_all_parameters_in_bfloat16_names_wide_parameters(one_rank):
    model = tiny_model(torch.float32)
    shard(model, shard_all_in_bfloat16=True)
    with pytest.raises(TypeError, match=r"wide_parameters\(model\)"):
        model(tokens_of(1, 5))


def test_the_error_of_a_matrix_without_an_axis_does_not_mention_batches():
    x, q = torch.randn(1, 4, 2), torch.ones(2, 1, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"cema: `p` must have shape \(D, N\), got \(2,\)\.$"):
        mo.cema(x, torch.ones(2), q, q, torch.ones(2))
