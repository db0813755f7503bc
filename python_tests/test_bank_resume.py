"""Save, load, continue: the same bits as never having stopped. Copies, casts and moves."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from scratch_tables import scratch_table
from tolerances import Kernels, Sizes, assert_table, bounds
from torch import nn

import contaccum_ext as ca

LAYOUT = ca.BankLayout(2, 4, 8)
OPTIONS = {
    "plain": {},
    "window": {"window": 9},
    "drift": {"drift": "mean"},
    "ids": {"ids": True},
    "offsets, window, ids": {"offsets": True, "window": 5, "ids": True},
    "bf16, drift": {"dtype": torch.bfloat16, "drift": "mean"},
    "fp64": {"dtype": torch.float64},
    "learned temperature": {"learn_temperature": True, "window": 9, "ids": True},
    "learned temperature, bf16": {"learn_temperature": True, "dtype": torch.bfloat16},
    "symmetric": {"symmetric": True, "ids": True},
    "symmetric, everything": {
        "symmetric": True,
        "learn_temperature": True,
        "offsets": True,
        "window": 5,
    },
}
KINDS = ("learn_temperature", "symmetric")
TAU = 0.3


def new_bank(options, device):
    dtype = options.get("dtype", torch.float32)
    kinds = {kind: options.get(kind, False) for kind in KINDS}
    drift = options.get("drift", "none")
    return ca.DualMemoryBank(21, 6, 2, dtype, device, drift, layout=LAYOUT, **kinds)


def configured(options, device):
    bank = new_bank(options, device)
    bank.window = options.get("window")
    return bank


def train(bank, first: int, last: int, options) -> list[torch.Tensor]:
    """Steps [first, last), each seeded by its number; everything that a step gives."""
    results = []
    for step in range(first, last):
        torch.manual_seed(step)
        n = (5, 3, 1, 8)[step % 4]
        kind = {"device": bank.bank_queries.device}
        kind["dtype"] = torch.float64 if bank.dtype == torch.float64 else torch.float32
        q = torch.randn(n, 6, **kind, requires_grad=True)
        p = torch.randn(n, 2, 6, **kind, requires_grad=True)
        ids = torch.randint(-1, 5, (n, 2), device=kind["device"]) if options.get("ids") else None
        inputs = [q, p]
        if options.get("learn_temperature"):  # a new scale every five steps
            inputs.append(torch.tensor(TAU + step // 5, **kind, requires_grad=True))
        tau = TAU if len(inputs) == 2 else inputs[2]
        loss = ca.contaccum_loss(q, p, bank, tau, ids, symmetric=bank.mirror is not None)
        results += [loss.detach(), *torch.autograd.grad(loss, inputs)]
        if step == 2 and options.get("offsets"):
            blocks = LAYOUT.offset_blocks(bank.capacity)
            bank.set_offsets(torch.randn(blocks, 6), torch.randn(blocks, 2, 6))
    return results


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_state_dict(bank, options):
    other = new_bank(options, bank.bank_queries.device)
    other.load_state_dict(bank.state_dict())
    return other


def by_file(bank, options):
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = new_bank(options, bank.bank_queries.device)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def by_safetensors(bank, options):
    st = pytest.importorskip("safetensors.torch")
    other = new_bank(options, bank.bank_queries.device)
    other.load_state_dict(st.load(st.save(bank.state_dict())))
    return other


def by_deepcopy(bank, options):
    return copy.deepcopy(bank)


def within_a_model(bank, options):
    def model(of):
        return nn.ModuleDict({"tower": nn.Linear(2, 2), "head": nn.Sequential(nn.Identity(), of)})

    other = model(new_bank(options, bank.bank_queries.device))
    other.load_state_dict(model(bank).state_dict())
    return other["head"][1]


WAYS = [by_state_dict, by_file, by_safetensors, by_deepcopy, within_a_model]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_going_on_is_bit_identical(device, way, name):
    options = OPTIONS[name]
    straight, stopped = configured(options, device), configured(options, device)
    expected = train(straight, 0, 14, options)
    got = train(stopped, 0, 5, options)
    stopped = way(stopped, options)
    got += train(stopped, 5, 9, options)  # wraps around between the two stops
    stopped = way(stopped, options)
    got += train(stopped, 9, 14, options)
    assert same(got, expected)
    states = [list(bank.state_dict().values()) for bank in (stopped, straight)]
    assert same(*states)
    assert stopped.window == straight.window
    assert stopped.has_ids == straight.has_ids == bool(options.get("ids"))


def test_a_copy_shares_nothing(device):
    bank = configured({}, device)
    train(bank, 0, 4, {})
    before = [b.clone() for b in bank.state_dict().values()]
    for other in (copy.deepcopy(bank), by_state_dict(bank, {})):
        train(other, 4, 8, {})
    assert same(before, list(bank.state_dict().values()))


def test_every_buffer_is_in_the_state_dict(device):
    bank = configured({}, device)
    assert {*dict(bank.named_buffers()), "_extra_state"} == set(bank.state_dict())
    assert not list(bank.parameters())


def assert_invariant_t(bank, written: int, scale: float) -> None:
    norm = 2 * bank.passages().double().norm(dim=-1).max().item()
    sizes = Sizes(1, 2, 6, len(bank), scale, norm, norm, 1.0)
    exact = scratch_table(bank, written, scale)
    assert_table(bank.table(), exact, bounds(sizes, bank.block_lse.dtype, Kernels()).table)


CASTS = {
    "to float64": (lambda bank: bank.to(torch.float64), torch.float64),
    "double": (lambda bank: bank.double(), torch.float64),
    "to bfloat16": (lambda bank: bank.to(torch.bfloat16), torch.bfloat16),
    "bfloat16": (lambda bank: bank.bfloat16(), torch.bfloat16),
    "half": (lambda bank: bank.half(), torch.float16),
    "float": (lambda bank: bank.float(), torch.float32),
    "in a model": (lambda bank: nn.Sequential(bank).half()[0], torch.float16),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_rounds_the_vectors_and_keeps_the_table_wide(device, name):
    cast, dtype = CASTS[name]
    options = {"drift": "mean"}
    bank = configured(options, device)
    train(bank, 0, 9, options)
    q, p, ids, means = bank.queries(), bank.passages(), bank.passage_ids(), bank.means.clone()
    written = 21 + int(bank.cursor[0])
    assert cast(bank) is bank
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert bank.dtype == bank.bank_passages.dtype == dtype
    assert torch.equal(bank.queries(), q.to(dtype))
    assert torch.equal(bank.passages(), p.to(dtype))
    assert torch.equal(bank.passage_ids(), ids) and bank.cursor.dtype == torch.int64
    for buffer in (bank.block_lse, bank.group_lse, bank.row_state, bank.means):
        assert buffer.dtype == acc
    assert torch.equal(bank.means, means.to(acc))  # never through the narrow type

    # The next call finds a table that fits the rounded vectors: as a bank that never knew others.
    fresh = ca.DualMemoryBank(21, 6, 2, dtype, device, "mean", layout=LAYOUT)
    fresh.load_state_dict(bank.state_dict())
    for other in (bank, fresh):
        train(other, 9, 10, options)
        assert_invariant_t(other, written + 3, 1 / TAU)
    assert same(train(bank, 10, 14, options), train(fresh, 10, 14, options))


def test_a_cast_and_back_keeps_what_the_narrow_type_left(device):
    bank = configured({}, device)
    train(bank, 0, 9, {})
    q = bank.queries()
    bank.bfloat16().float()
    assert torch.equal(bank.queries(), q.bfloat16().float())
    train(bank, 9, 12, {})
    assert_invariant_t(bank, 21 + int(bank.cursor[0]), 1 / TAU)


def test_a_move_that_moves_nothing_changes_nothing(device):
    bank, still = configured({}, device), configured({}, device)
    for other in (bank, still):
        train(other, 0, 9, {})
    bank.to(device).to(torch.float32).float()
    assert same(list(bank.state_dict().values()), list(still.state_dict().values()))
    assert same(train(bank, 9, 12, {}), train(still, 9, 12, {}))


def test_a_loaded_bank_replaces_what_was_there(device):
    """Loading into a bank that has lived: its slots, window, ids and scale are the state's."""
    source, target = configured({}, device), configured({"window": 5}, device)
    train(source, 0, 6, {})
    train(target, 3, 12, {"ids": True})
    target.load_state_dict(source.state_dict())
    assert target.window == source.window == 21 and target.has_ids is False
    assert same(train(target, 6, 12, {}), train(source, 6, 12, {}))


def test_an_empty_bank_saves_and_loads(device):
    fresh, loaded = configured({}, device), new_bank({}, device)
    loaded.load_state_dict(fresh.state_dict())
    assert len(loaded) == 0 and loaded.has_ids is None
    assert same(train(loaded, 0, 5, {}), train(fresh, 0, 5, {}))


def test_assigning_a_state_keeps_going(device):
    """load_state_dict(assign=True) puts other tensors in the buffers' place."""
    straight, stopped = configured({}, device), configured({}, device)
    expected = train(straight, 0, 9, {})
    got = train(stopped, 0, 5, {})
    other = new_bank({}, device)
    other.load_state_dict(copy.deepcopy(stopped.state_dict()), assign=True)
    assert same(got + train(other, 5, 9, {}), expected)
