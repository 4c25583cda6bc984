"""An encoder on several ranks that split the rows: training as in one process, folders, errors."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from assertions import message_of
from data_parallel import mesh_of_all, own_rows, parameters_of
from models import TINY, tokens_of

import megalodon_ops as mo
from megalodon_ops.distributed import ParallelMegalodonEncoder, make_mesh, parallelize

LENGTHS = torch.tensor([21, 8, 13, 1])
CLASSES = torch.tensor([2, 0, 1, 1])


def new_encoder() -> mo.MegalodonEncoder:
    torch.manual_seed(0)
    return mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**TINY, num_classes=3)).double()


def train(encoder: mo.MegalodonEncoder) -> dict[str, torch.Tensor]:
    """Parameters after two optimizer steps on four rows, two for each of two ranks."""
    rows = own_rows()
    tokens = tokens_of(4, 21)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    for _ in range(2):
        F.cross_entropy(encoder(tokens[rows], lengths=LENGTHS[rows]), CLASSES[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(encoder)


def train_on_ranks(data: str, folder: str):
    """Parameters after training, logits of the gathered encoder, and the dtype of a bfloat16 encoder's features."""
    encoder = parallelize(new_encoder(), mesh_of_all(), data=data)
    with pytest.raises(ValueError, match="must give each row at least one position"):
        encoder(tokens_of(1, 4), lengths=torch.tensor([0]))
    found = train(encoder)
    encoder.save(folder)
    with torch.no_grad():
        logits = encoder.alone()(tokens_of(4, 21), lengths=LENGTHS)
        cast = parallelize(new_encoder().float(), mesh_of_all(), data=data, param_dtype=torch.bfloat16)
        return found, logits, cast.features(tokens_of(1, 9)).dtype


@pytest.mark.parametrize("data", ["shard", pytest.param("replicate", marks=pytest.mark.slow)])
def test_ranks_train_as_one_process(ranks, tmp_path, data):
    one = new_encoder()
    expected = train(one)
    for found, logits, dtype in ranks.run(train_on_ranks, 2, data, f"{tmp_path}/encoder"):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(logits, one(tokens_of(4, 21), lengths=LENGTHS).detach(), rtol=1e-8, atol=1e-8)
        assert dtype == torch.bfloat16
    loaded = mo.MegalodonEncoder.load(tmp_path / "encoder")
    torch.testing.assert_close(parameters_of(loaded), found, rtol=0, atol=0)


def test_is_initialised_on_meta_and_refused_when_parallel(parallelize_runs):
    try:
        mesh = make_mesh("data=1", device_type="cpu")
        torch.manual_seed(0)
        wanted = new_encoder().float()
        with torch.device("meta"):
            encoder = mo.MegalodonEncoder(wanted.config)
        torch.manual_seed(0)
        parallel = parallelize(encoder, mesh)
        assert isinstance(parallel, ParallelMegalodonEncoder)
        torch.testing.assert_close(parameters_of(parallel), parameters_of(wanted), rtol=0, atol=0)
        for model, name in ((parallel, "Parallel"), (encoder, "MegalodonEncoder")):  # the second has no modules left
            with pytest.raises(TypeError, match=f"a MegalodonEncoder that is not parallel yet, got .*{name}"):
                parallelize(model, mesh)
    finally:
        dist.destroy_process_group()


def chunk_error() -> str:
    mesh = make_mesh("chunk=2", device_type="cpu")
    return message_of(lambda: parallelize(new_encoder(), mesh))


def test_sequences_are_not_split(ranks):
    for message in ranks.run(chunk_error, 2):
        assert message == "parallelize: `mesh` must have chunk = 1 for an encoder, got 2; only rows are split."
