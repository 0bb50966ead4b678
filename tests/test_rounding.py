"""Rounding a matrix to few bits, the layers that hold it, and the kernels that multiply by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import RankwiseError
from rankwise.calibration.moments import Moments
from rankwise.decomposition import kronecker, whitened
from rankwise.decomposition.compensation import Compensation
from rankwise.decomposition.grid import Grid, unit_of
from rankwise.decomposition.kronecker import input_root
from rankwise.decomposition.rounding import low_rank_in_bits, nearest, roundings
from rankwise.decomposition.trellis import nearest_path
from rankwise.layers.lowrank import FORMS, layer_class
from rankwise.layers.matrices import Shape
from rankwise.layers.quantised import GROUP, WIDTHS, QuantisedLinear, pack, unpack
from rankwise.layers.trellis import table_of, values
from rankwise.runtime.kernels import with_kernels


def drawn(*sides: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sides, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.sampled_from(WIDTHS), seed=st.integers(0, 9))
def test_whole_numbers_are_packed_without_loss(rows: int, columns: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8, generator=generator)
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)
    assert pack(codes, bits).nbytes == rows * (columns if bits == 8 else bits * -(-columns // 8))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_with_its_weight(bits: int, dtype: torch.dtype) -> None:
    W, bias, x = drawn(12, 100).to(dtype), drawn(12).to(dtype), drawn(3, 100, seed=1).to(dtype)
    layer = nearest(W, bits).layer(bias)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, bias))
    assert (layer.weight.float() - W.float()).norm() < 2.0 ** (1 - bits) * W.float().norm()
    empty = Shape(12, 100).empty(None, bits, bias=True, dtype=dtype)
    empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_factors_in_eight_bits_are_nearly_the_factors(form: str) -> None:
    layer = layer_class(form, 40, 72).from_factors(drawn(40, 20), drawn(20, 72, seed=1))
    exact, shape = layer.weight, Shape(40, 72, form=form)
    written = low_rank_in_bits(layer, 8)
    assert (written.weight - exact).norm() < 0.02 * exact.norm()
    assert sum(t.nbytes for t in written.state_dict().values()) == shape.stored_bytes(20, 8, torch.float32)
    assert all(isinstance(part, QuantisedLinear) for part in (written.first, written.second))


def moments_of(inputs: int, outputs: int) -> Moments:
    X, G = drawn(9000, inputs, seed=2) * torch.arange(1, inputs + 1) ** -0.7, drawn(9000, outputs, seed=3)
    X = X @ torch.linalg.qr(drawn(inputs, inputs, seed=4)).Q
    return Moments(9000, (X.T @ X).double(), output=G.T @ G)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [bits for bits in WIDTHS if bits < 8])
def test_scales_are_stored_in_a_byte(bits: int, dtype: torch.dtype) -> None:
    W = (drawn(40, 100) * torch.arange(1, 41)[:, None] ** -2.0).to(dtype)  # rows that differ by orders
    layer = nearest(W, bits).layer(None)
    state = layer.state_dict()
    groups = {2: 2, 3: 2}.get(bits, 4)
    assert (state["scales"].dtype, state["scales"].shape) == (torch.uint8, (40, groups))
    assert sum(tensor.nbytes for tensor in state.values()) == 40 * (bits * 13 + groups) + dtype.itemsize
    assert all(((w - v).norm() < 2.0 ** (1 - bits) * w.norm()) for w, v in zip(W.float(), layer.weight.float(), strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_looks_at_the_inputs(bits: int) -> None:
    W, moments = drawn(48, 160), moments_of(160, 48)
    roots = kronecker.roots(moments)
    rounding, error = roundings(W, (bits,), kronecker, moments)[bits]
    assert error == pytest.approx(rounding.squared_error(W, *roots))
    assert error < 0.7 * nearest(W, bits).squared_error(W, *roots)


def by_gptq(W: torch.Tensor, H: torch.Tensor, bits: int) -> torch.Tensor:
    """What GPTQ as published makes of W [m, n]: columns from the first to the last, once, the scales of nearest weights."""
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    U, rest = torch.linalg.cholesky(torch.linalg.inv(H), upper=True), W.double().clone()
    grid, ones = Grid(bits, unit_of(W, 2 ** (bits - 1))), torch.ones(GROUP)
    parts = [grid.first(part.T, ones, torch.eye(GROUP))[1] for part in W.split(GROUP, 1)]
    scales, most = torch.stack(parts, 1).double(), 2 ** (bits - 1)
    for j in range(len(H)):
        scale = scales[:, j // GROUP]
        number = (rest[:, j] / scale).round().clamp(-most, most - 1)
        rest[:, j + 1 :] -= ((rest[:, j] - number * scale) / U[j, j])[:, None] * U[j, j + 1 :]
        rest[:, j] = number * scale
    return rest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_is_better_than_gptq_as_published(bits: int) -> None:
    W, moments = drawn(48, 160), moments_of(160, 48)
    assert moments.input is not None
    H = moments.input / moments.count
    rounding, _ = roundings(W, (bits,), whitened, moments)[bits]
    errors = [E @ H @ E.T for E in (W.double() - by_gptq(W, H, bits), (W - rounding.layer(None).weight).double())]
    published, ours = (float(error.trace()) for error in errors)
    assert ours < 0.97 * published


@pytest.mark.parametrize("bits", [2, 3])
def test_a_trellis_is_better_than_a_grid_of_more_bytes(bits: int) -> None:
    W, moments = drawn(48, 192), moments_of(192, 48)
    compensation, unit = Compensation(input_root(moments), None, W), unit_of(W, 2 ** (bits - 1))
    codes, steps = compensation.rounded(W, Grid(bits, unit))
    on_grid = QuantisedLinear.of(codes, steps, unit, bits, coding="grid")
    on_trellis = roundings(W, (bits,), whitened, moments)[bits][0].layer(None)
    assert moments.input is not None
    error = {layer: (E := (W - layer.weight).double()) @ moments.input @ E.T for layer in (on_grid, on_trellis)}
    assert error[on_trellis].trace() < 0.92 * error[on_grid].trace()
    held = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in (on_trellis, on_grid)]
    assert held[0] < held[1]


@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 5), bits=st.sampled_from((2, 3)), seed=st.integers(0, 99))
def test_an_open_path_is_the_best_of_all(columns: int, bits: int, seed: int) -> None:
    columns = min(columns, 4) if bits == 3 else columns
    x, weights = drawn(columns, 3, seed=seed), drawn(columns, seed=seed + 1).square()
    path = nearest_path(x, weights, table_of(bits, x), bits).T.to(torch.int8)
    every = torch.cartesian_prod(*[torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))] * columns).view(-1, columns).to(torch.int8)
    errors, found = (((values(codes, bits)[:, None] - x.T).square() * weights).sum(-1) for codes in (every, path))  # [paths, 3]
    torch.testing.assert_close(found.diagonal(), errors.amin(0))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 140), bits=st.sampled_from((2, 3)), seed=st.integers(0, 99))
def test_a_code_is_read_after_those_before_it_in_its_group_a_ring(rows: int, columns: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8, generator=generator)
    table, wanted = table_of(bits, codes), torch.empty(rows, columns)
    for i, row in enumerate(codes.long() + 2 ** (bits - 1)):
        for group, into in zip(row.split(64), wanted[i].split(64), strict=True):
            register = 0  # before the first of a group that is no ring
            for code in (*group.tolist(), *group.tolist()) if len(group) == 64 else group.tolist():
                register = (register << bits | code) % len(table)
                into[:-1] = into[1:].clone()
                into[-1] = table[register]
    assert torch.equal(values(codes, bits), wanted)
    for at in range(0, columns, 64):  # no other path is as near
        part = wanted[:, at : at + 64].T
        assert torch.equal(nearest_path(part, torch.ones(len(part)), table, bits).T.to(torch.int8), codes[:, at : at + 64])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_make_up_for_the_errors_of_others(bits: int) -> None:
    W, moments = drawn(48, 160), moments_of(160, 48)
    outputs = drawn(9000, 48, seed=5) * torch.arange(1, 49) ** -1.0 @ drawn(48, 48, seed=6)
    moments.output = outputs.T @ outputs
    roots = kronecker.roots(moments)
    alone, together = (roundings(W, (bits,), metric, moments)[bits][0] for metric in (whitened, kronecker))
    assert together.squared_error(W, *roots) < 0.9 * alone.squared_error(W, *roots)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("what", ["zero", "one feature", "huge", "tiny"])
def test_odd_weights_and_inputs_are_rounded(bits: int, what: str) -> None:
    W, moments = drawn(6, 70), moments_of(70, 6)
    if what == "one feature":
        moments.input = torch.zeros(70, 70, dtype=torch.float64)
        moments.input[3, 3] = 1.0
    else:
        W = W * {"zero": 0.0, "huge": 1e30, "tiny": 1e-30}[what]
    rounding, _ = roundings(W, (bits,), kronecker, moments)[bits]
    weight = rounding.layer(None).weight
    assert torch.isfinite(weight).all()
    assert (weight - W).norm() <= W.norm()


def test_a_squared_error_is_that_of_the_metric() -> None:
    W, moments = drawn(10, 20), moments_of(20, 10)
    left, right = kronecker.roots(moments)
    assert left is not None
    assert right is not None
    rounding = nearest(W, 4)
    E = (W - rounding.layer(None).weight).double()
    right_metric = right.full / right.count + torch.diag(right.scale**2)  # type: ignore[operator]
    left_metric = left.full / left.count + torch.diag(left.scale**2)  # type: ignore[operator]
    wanted = torch.trace(left_metric @ E @ right_metric @ E.T).item()
    assert rounding.squared_error(W, left, right) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sides", [(32, 128), (32, 100), (32, 96), (40, 96), (7, 32)], ids=str)
def test_kernels_multiply_by_the_same_weight(bits: int, dtype: torch.dtype, sides: tuple[int, int]) -> None:
    W, bias, x = drawn(*sides).to(dtype), drawn(sides[0]).to(dtype), drawn(2, 3, sides[1], seed=1).to(dtype)
    model = torch.nn.ModuleDict({"layer": nearest(W, bits).layer(bias)})
    before, state = model["layer"](x), model.state_dict()
    with_kernels(model)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(model["layer"](x), before, rtol=tolerance, atol=tolerance * before.abs().max().item())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    other = {torch.float32: torch.float16, torch.bfloat16: torch.float32}[dtype]
    with pytest.raises(RankwiseError, match="moved or cast"):
        model.to(other)["layer"](x.to(other))
