"""The raw operator of backward: both saved gradients times a factor, rounded once."""

from __future__ import annotations

import math

import pytest
import torch
from test_op_raw import raw_arguments
from test_op_refusals import D, M, N, bank_with

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FLOATING = [F32, F64, BF16, F16]

scaled_gradients = torch.ops.contaccum_ext.scaled_gradients.default


def accumulation(dtype):
    return F64 if dtype == F64 else F32


def gradients(device, dtype, n=5, m=2, d=7):
    """As banked_loss_ leaves them for inputs of that dtype."""
    torch.manual_seed(0)
    kind = {"dtype": accumulation(dtype), "device": device}
    return torch.randn(n, d, **kind), torch.randn(n, m, d, **kind)


def expected(gradient, factor, dtype):
    """A product in the accumulation type and one rounding: no tolerance is needed."""
    return (gradient * factor.to(gradient.dtype)).to(dtype)


def assert_scaled(dq, dp, factor, dtype):
    like = torch.empty(0, dtype=dtype, device=dq.device)
    results = scaled_gradients(dq, dp, factor, like)
    for got, gradient in zip(results, (dq, dp), strict=True):
        assert got.dtype == dtype and got.device == dq.device and got.shape == gradient.shape
        assert got.is_contiguous()
        wanted = expected(gradient, factor, dtype)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("factor_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
def test_every_pair_of_dtypes(device, dtype, factor_dtype):
    factor = torch.tensor(-1 / 3, dtype=factor_dtype, device=device)
    assert_scaled(*gradients(device, dtype), factor, dtype)


# Several thread blocks, none; ends that are and are not multiples of a vector or a block.
SIZES = [(1, 1, 1), (1, 3, 2), (4, 1, 256), (3, 2, 341), (128, 2, 64), (61, 3, 67), (0, 2, 8)]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_sizes(device, n, m, d, dtype):
    factor = torch.tensor(1.7, dtype=accumulation(dtype), device=device)
    assert_scaled(*gradients(device, dtype, n, m, d), factor, dtype)


@pytest.mark.parametrize("dtype", FLOATING)
def test_addresses_that_no_vector_begins_at(device, dtype):
    dq, dp = gradients(device, dtype, 8, 2, 32)
    factor = torch.tensor([2.0, 0.3], dtype=dq.dtype, device=device)[1]
    for one in (dq.flatten()[1:], dq):
        for other in (dp.flatten()[3:], dp):
            assert_scaled(one, other, factor, dtype)


@pytest.mark.parametrize("dtype", FLOATING)
def test_strided_gradients_and_a_factor_of_one_element(device, dtype):
    dq, dp = gradients(device, dtype)
    for shape in ((), (1,), (1, 1)):
        factor = torch.full(shape, 0.1, dtype=dq.dtype, device=device)
        assert_scaled(dq.T, dp.expand(3, *dp.shape), factor, dtype)


@pytest.mark.parametrize("factor", [math.inf, -math.inf, math.nan, 0.0, -0.0])
@pytest.mark.parametrize("dtype", FLOATING)
def test_what_is_not_finite_is_multiplied_like_the_rest(device, dtype, factor):
    dq, dp = gradients(device, dtype)
    for g in (dq, dp):
        g.view(-1)[:5] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    factor = torch.tensor(factor, dtype=dq.dtype, device=device)
    assert_scaled(dq, dp, factor, dtype)
    first = scaled_gradients(dq, dp, factor, dq)[0].view(-1)[0]
    assert bool(first.isnan()) == (not factor.isfinite())


def test_float16_gains_from_the_factor_what_it_could_not_hold(device):
    """A subnormal of float16 is 6e-8; and products beyond its range are infinite."""
    dq = torch.tensor([[1e-9, -1e-9, 1.0, -1.0]], device=device)
    factor, like = torch.tensor(65536.0, device=device), dq.half()
    got, _ = scaled_gradients(dq, dq[:, None], factor, like)
    assert (like[0, :2] == 0).all()
    wanted = torch.tensor([[6.5536e-5, -6.5536e-5, math.inf, -math.inf]], device=device)
    # 6.5536e-5 is a normal number: half a unit in the last of 11 bits, and of 24 on the way.
    torch.testing.assert_close(got.float(), wanted, rtol=2**-11 + 2**-23, atol=0)


@pytest.mark.parametrize("given", [F32, BF16, F16])
@pytest.mark.parametrize("stored", [F32, BF16, F16])
def test_the_loss_leaves_gradients_in_the_accumulation_type(device, given, stored):
    arguments = raw_arguments(bank_with(device, dtype=stored), device)
    arguments[:2] = [x.to(given) for x in arguments[:2]]
    loss, dq, dp, _ = torch.ops.contaccum_ext.banked_loss_(*arguments)
    assert loss.dtype == dq.dtype == dp.dtype == F32
    assert dq.shape == (N, D) and dp.shape == (N, M, D)


# (position in the schema, replacement, what the message must contain)
REFUSED = {
    "gradient of a half": (0, torch.zeros(N, D).half(), ["d_queries", "float64", "float16"]),
    "gradient of ints": (0, torch.zeros(N, D).long(), ["d_queries", "float32", "int64"]),
    "two dtypes": (1, torch.zeros(N, M, D).double(), ["d_passages", "float32", "float64"]),
    "a factor of ints": (2, torch.tensor(1), ["factor", "float32", "int64"]),
    "two factors": (2, torch.ones(2), ["factor", "one element", "(2,)"]),
    "no factor": (2, torch.ones(0), ["factor", "one element", "(0,)"]),
    "into float64": (3, torch.ones(1).double(), ["like", "narrower than float64", "float64"]),
    "into ints": (3, torch.ones(1).int(), ["like", "float32", "int32"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(device, name):
    position, value, words = REFUSED[name]
    arguments = [*gradients(device, F32), torch.tensor(1.0), torch.zeros(1)]
    arguments[position] = value
    with pytest.raises(RuntimeError) as caught:
        scaled_gradients(*(x.to(device) for x in arguments))
    assert all(word in str(caught.value) for word in words), caught.value


def test_float64_gradients_into_float32_are_refused(device):
    arguments = [*gradients(device, F64), torch.tensor(1.0, device=device)]
    with pytest.raises(RuntimeError, match=r"like: expected dtype float64 .* got float32"):
        scaled_gradients(*arguments, torch.zeros(1, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("position", "name"), [(1, "d_passages"), (2, "factor")])
def test_two_devices_are_refused(position, name):
    arguments = [*gradients("cuda", F32), torch.tensor(1.0, device="cuda"), torch.zeros(1)]
    arguments[position] = arguments[position].cpu()
    with pytest.raises(RuntimeError, match=f"{name}: expected the device of d_queries"):
        scaled_gradients(*arguments)


@pytest.mark.parametrize("dtype", FLOATING)
def test_opcheck(device, dtype):
    dq, dp = gradients(device, dtype)
    factor = torch.tensor(0.3, dtype=dq.dtype, device=device)
    for arguments in ((dq, dp), (dq.T, dp.transpose(0, 2))):
        done = torch.library.opcheck(scaled_gradients, (*arguments, factor, dq.to(dtype)))
        assert set(done.values()) == {"SUCCESS"} and len(done) == 4, done
