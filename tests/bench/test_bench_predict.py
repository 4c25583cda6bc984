"""Predictions of time: parsing of machine code, a floor computed by hand, growth of floors with shapes."""

import dataclasses

import pytest
import torch
from bench.sass_loops import Code, parse
from bench.sass import Kernel, MissingTool, installed
from backends import needs_cuda_kernels
from decoding import model_and_state
from models import tokens_of

from bench import predict, predict_decoding
from bench.predict import ATTENTION, CARDS, KERNELS, SHAPES, Launch
from megalodon_ops import _C
from megalodon_ops.inference.decoding_model import decoding_model
from megalodon_ops.ops.chunked_attention import dense_attention

# Two nested loops, the inner one on tensor cores; a skipped block with Philox's factor; code moved to the end.
LISTING = """
.section	.text.kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P2 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/              @!PT LDS RZ, [RZ] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], [R8.64] ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
        /*0050*/                   IMAD.WIDE.U32 R4, R4, -0x326172a9, RZ ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
.L_x_3:
        /*0070*/                   FFMA R4, R4, R5, R6 ;
.L_x_2:
        /*0080*/                   LDSM.16.M88.4 R4, [R20] ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R8, R4, R8, R4 ;
        /*00b0*/               @P0 BRA `(.L_x_2) ;
        /*00c0*/                   DEPBAR.LE SB0, 0x1 ;
        /*00d0*/               @P0 BRA `(.L_x_1) ;
.L_x_8:
        /*00e0*/                   STG.E.128 [R2.64], R4 ;
        /*00f0*/                   EXIT ;
.L_x_9:
        /*0100*/                   MUFU.RCP R4, R4 ;
        /*0110*/                   BRA `(.L_x_8) ;
"""
CARD = predict.Card(90, sms=10, ghz=1.0, memory=100, l2=64, tensor=1024, fp32=64, shared=100, warps=64, source="")
LAUNCH = Launch("kernel", blocks=20, threads=64, memory=5e6, shared=30000, trips={"DEPBAR": 3}, work={"HMMA": 24})


@pytest.fixture
def code() -> Code:
    return parse(LISTING, {"kernel": Kernel("kernel", 90, registers=100, shared=0)})["kernel"]


def test_a_floor_by_hand(code):
    """A warp makes 3 trips of the outer loop, 12 of the inner, the rest once; 40 warps share 10 multiprocessors."""
    outer, inner, rest = 7 - 1, 4, 6  # two of the outer loop's 8 instructions are Philox's block
    issued = 3 * outer + 12 * inner + rest
    assert predict.instructions(code, LAUNCH).total() == issued
    cycles = {
        "issue": issued / 4,
        "shared": (3 * 512 + 12 * 512) / 128,  # a copy and an ldmatrix move 512 bytes; the disabled LDS moves none
        "tensor": 24 * 4096 / 1024,
        "fp32": 3 * 32 / 64,
        "special": 32 / 16,  # MUFU.RCP alone
    }
    expected = {name: 40 * n / 10 / 1e3 for name, n in cycles.items()}
    expected |= {"L2": 40 * (3 + 1) * 512 / 64 / 1e3, "memory": 50.0}
    assert predict.floors(code, LAUNCH, CARD) == pytest.approx(expected)


def test_blocks_per_multiprocessor(code):
    """Limits: shared memory, 100 KiB for 30,000 bytes + 1 KiB each; registers, 2 x 32 x 104 each; warps."""
    assert predict.blocks_at_once(code, LAUNCH, CARD) == 3
    for changed, blocks in ({"shared": 0}, 9), ({"shared": 0, "threads": 1024}, 1):
        assert predict.blocks_at_once(code, Launch(**vars(LAUNCH) | changed), CARD) == blocks


def test_a_missing_loop_is_an_error(code):
    with pytest.raises(ValueError, match="kernel: expected a loop with SHFL, got none"):
        predict.instructions(code, Launch(**vars(LAUNCH) | {"trips": {"SHFL": 1.0}}))


@pytest.mark.parametrize("path", KERNELS)
def test_twice_the_tokens_are_twice_the_work(path):
    """Twice the blocks or, in a kernel with a constant grid, twice the trips of each block."""
    sizes = next(sizes for sizes, paths in SHAPES.values() if path in paths)
    for one, two in zip(KERNELS[path](**sizes), KERNELS[path](**sizes | {"T": 2 * sizes["T"]}), strict=True):
        assert two.kernel == one.kernel and two.memory == 2 * one.memory
        for loop in one.trips.keys() | one.work.keys() or {None}:
            trips = [launch.trips.get(loop, 0) + launch.work.get(loop, 0) or 1 for launch in (one, two)]
            factor = 1 if one.kernel == "cema_cross_kernel<float>" else 2  # its loop over tiles is not counted
            assert two.blocks * trips[1] == factor * one.blocks * trips[0], (one.kernel, loop)


def test_longer_chunks_take_more_tiles():
    """16 row blocks of 128 have 136 tiles on or below the diagonal, 32 have 528."""
    short, long = ({"T": 32768, "C": C, "K": 64, "V": 128, "H": 1} for C in (2048, 4096))
    assert [next(KERNELS["attention backward"](**sizes)).blocks for sizes in (short, long)] == [16 * 136, 8 * 528]


def test_the_table_has_measured_times(code, monkeypatch):
    """Small shapes on the processor, with one kernel in place of all."""
    small = {"T": 32, "C": 16, "K": 8, "V": 8, "H": 1, "D": 8, "N": 4, "G": 2, "cached": 4, "steps": 1}
    shapes = {name: ({n: small[n] for n in sizes}, paths) for name, (sizes, paths) in SHAPES.items()}
    monkeypatch.setattr(predict, "SHAPES", shapes)
    monkeypatch.setattr(predict, "KERNELS", dict.fromkeys(KERNELS, lambda **sizes: iter([LAUNCH])))
    monkeypatch.setattr(predict.gpu, "timed", lambda way, calls: (1.5e-6 * calls, way()))
    measured = predict.measure(shapes, device="cpu")
    rows = {(name, path) for name, (_, paths) in shapes.items() for path in paths}
    not_used = {("cema of 8 x 2048", f"cema {way} by scans") for way in ("forward", "backward")}
    assert rows - measured.keys() == not_used | {("200M", "attention forward by short tiles")}
    text = predict.table({"kernel": code}, CARD, shapes, measured)
    libraries = [path for _, path in measured if path in predict.ATTENTION]
    assert text.count("| 50 | memory |") == len(rows) and text.count("| 50.0 | 1.5 |") == len(measured)
    assert text.count("| 50.0 | 1.5 | 1.5 |") == len(libraries) == 6
    unknown = predict.times_without_floors(measured)
    assert len(unknown) == len(measured) and {row[2:4] for row in unknown} == {("", "1.5")}


def test_a_card_is_found_by_torchs_name():
    same = ["H100 PCIe", "H100 NVL", "H200", "L40S", "B200"]
    names = {
        "A100-SXM4-80GB": "A100",
        "A100-PCIE-40GB": "A100 40GB",
        "H100 80GB HBM3": "H100",
        "GeForce RTX 4090": "4090",
    }
    cards = {name: name for name in same} | names | {"T4": None, "H100 80GB HBM3 MIG 1g.10gb": None}
    assert {name: predict.card_of(f"NVIDIA {name}") for name in cards} == cards


def chosen_shapes() -> list[tuple[dense_attention.Shapes, dict[str, int]]]:
    """Rows of the table of attention's libraries that have predictions, with the sizes of these."""
    rows = [row for row in dense_attention.TABLE if row.predicted]
    return [
        (row, {"T": 16384, "C": 2048, "K": row.key_dim[1], "V": row.value_dim[0], "H": 8 if row.path == "flash" else 1})
        for row in rows
    ]


@pytest.fixture(scope="module")
def codes() -> dict[str, Code]:
    """Machine code of the installed kernels, for an H100."""
    names = {launch.kernel for sizes, paths in SHAPES.values() for path in paths for launch in KERNELS[path](**sizes)}
    names |= {launch.kernel for _, sizes in chosen_shapes() for path in ATTENTION for launch in KERNELS[path](**sizes)}
    try:
        codes = predict.loops.codes_of(installed(), names, 90)
    except MissingTool as missing:
        pytest.skip(str(missing))
    assert codes.keys() == names
    return codes


@needs_cuda_kernels
@pytest.mark.slow
def test_the_table_of_attention_has_the_predictions(codes):
    """A library computes a direction where it is faster than the floor of the kernels, or at most 12 % slower."""
    card = CARDS["H100"]
    for row, sizes in chosen_shapes():
        for direction, path, (floor, library) in zip(dense_attention.DIRECTIONS, ATTENTION, row.predicted, strict=True):
            launches = [(codes[launch.kernel], launch) for launch in KERNELS[path](**sizes)]
            found = sum(max(predict.floors(*launch, card).values()) for launch in launches)
            assert floor == pytest.approx(found, rel=0.1)  # the table counts nvcc 13's code for sm_80
            found = predict.library(path, card, **sizes)
            assert library == (found and round(found[1])), (row.path, direction)
            if library:
                assert (direction in row.directions) == (library <= 1.12 * floor), (row.path, direction)


@needs_cuda_kernels
@pytest.mark.slow
def test_tensor_core_floors_match_the_shapes(codes):
    """Installed kernels: in the forward a warp of 16 rows computes whole tiles of keys, in the backward tiles are 128 x 128."""
    (sizes, _), card = SHAPES["200M"], CARDS["H100"]
    T, C, K, V = (sizes[name] for name in "TCKV")
    per_us = card.sms * card.ghz * 1e3 * card.tensor
    rows_of_warp = torch.arange(15, C, 16)  # the last row, which sees tiles of 64 keys
    pairs = (rows_of_warp // 64 + 1).sum() * 64 * 16 * (T // C)
    (forward,) = KERNELS["attention forward"](**sizes)
    floor = predict.floors(codes[forward.kernel], forward, card)["tensor"]
    assert floor == pytest.approx(2 * int(pairs) * (K * V / 256 + V) / per_us)
    tiles = T // C * 136 * 128 * 128
    for launch, width in zip(KERNELS["attention backward"](**sizes), (K + V, 2 * K + V), strict=True):
        assert predict.floors(codes[launch.kernel], launch, card)["tensor"] == pytest.approx(2 * tiles * width / per_us)
    for shape, (sizes, paths) in SHAPES.items():
        for launch in (launch for path in paths for launch in KERNELS[path](**sizes)):
            assert all(us >= 0 for us in predict.floors(codes[launch.kernel], launch, card).values()), shape


def test_launches_of_a_decoded_token(emulator):
    """Kernels of each op are those that the emulator launches; a layer adds the same number each time."""
    model, state = model_and_state(torch.bfloat16, num_layers=1, chunk_size=80, seen=66)
    run = decoding_model(model, model, [], fused_dtype=torch.bfloat16)
    emulator.reset()
    with emulator.replacing(_C), torch.no_grad():
        run(tokens_of(1, 1), state=state, return_state=True, inplace_state=True)
    kernels = predict_decoding.OPS
    assert len(emulator.module.launched()) == sum(kernels.values())  # of different names
    one, two, three = (
        predict_decoding.launches_of_a_token(dataclasses.replace(model.config, num_layers=n)) for n in (1, 2, 3)
    )
    in_layer = kernels | {"layer_norm_fwd": 2, "linear_few_rows": 7}
    assert three - two == two - one and (two - one).items() >= in_layer.items()
    head, row = predict_decoding.rows("mega200M", {"card": CARD})
    assert dict(zip(head, row))["reading the weights ms"] == "4.41"  # 2 bytes of 220,627,968 at 100 GB/s
