"""The operator's registration, and training steps under torch.compile."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch
from test_op_raw import raw_arguments
from test_op_refusals import assert_same_state, bank_with, ids, state
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import contaccum_ext as ca

CAPACITY, D, M, N, FEATURES = 37, 16, 2, 5, 8

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="inductor needs a C++ compiler, found none",
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# All four of opcheck's utilities apply. Inputs do not require grad: the schema is mutable, so that
# the operator has no autograd kernel, and gradients come from the autograd.Function around it,
# which test_op_gradients.py checks with gradcheck.
@pytest.mark.parametrize("slots", [0, 5, 9])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("with_grad", [False, True])
def test_opcheck(with_grad, with_ids, slots):
    arguments = raw_arguments(bank_with("cpu", with_ids, slots, drift="mean"))
    arguments[21] = with_grad
    if with_ids:
        arguments[2] = ids("cpu", 3, 2)
    done = torch.library.opcheck(torch.ops.contaccum_ext.banked_loss_.default, arguments)
    assert set(done.values()) == {"SUCCESS"} and len(done) == 4, done


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_of_mixed_dtypes(given, stored):
    arguments = raw_arguments(bank_with("cpu", dtype=stored))
    arguments[:2] = [
        x.to(given).transpose(0, -1).contiguous().transpose(0, -1) for x in arguments[:2]
    ]
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.contaccum_ext.banked_loss_.default, arguments, test_utils=utilities
    )


@pytest.mark.parametrize("slots", [0, 9])
def test_opcheck_of_a_learned_temperature_beside_companions(slots):
    arguments = raw_arguments(bank_with("cpu", slots=slots, learn_temperature=True))
    arguments[22] = True
    arguments[3] = torch.randn(3, 2, 4)
    done = torch.library.opcheck(torch.ops.contaccum_ext.banked_loss_.default, arguments)
    assert set(done.values()) == {"SUCCESS"} and len(done) == 4, done


class Trainer:
    """A tower, a bank and a step; the same data for every instance."""

    def __init__(
        self, device, compile_with=None, drift="mean", with_ids=False, kinds=None, **options
    ):
        torch.manual_seed(0)
        self.tower = nn.Linear(FEATURES, D, device=device)
        kinds = dict(kinds or {})
        self.center_over = kinds.pop("center_over", None)
        self.bank = ca.DualMemoryBank(CAPACITY, D, M, device=device, drift=drift, **kinds)
        self.with_ids, self.device = with_ids, device
        self.generator = torch.Generator().manual_seed(1)
        self.step = self.forward
        if compile_with is not None:
            self.step = torch.compile(self.forward, backend=compile_with, fullgraph=True, **options)

    def forward(self, x, y, given):
        options = {"symmetric": self.bank.mirror is not None, "center_over": self.center_over}
        return ca.contaccum_loss(self.tower(x), self.tower(y), self.bank, 0.5, given, **options)

    def __call__(self, n=N):
        """Loss and gradients of the tower, then a step of SGD."""
        x = torch.randn(n, FEATURES, generator=self.generator).to(self.device)
        y = torch.randn(n, M, FEATURES, generator=self.generator).to(self.device)
        given = torch.randint(0, 5, (n, M), generator=self.generator).to(self.device)
        loss = self.step(x, y, given if self.with_ids else None)
        grads = torch.autograd.grad(loss, list(self.tower.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(self.tower.parameters(), grads, strict=True):
                parameter -= 0.01 * grad
        return [loss.detach(), *grads]


def assert_close_steps(compiled, eager) -> None:
    """Fused kernels may order sums otherwise: a few eps of the largest score, here about 100."""
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_through_the_wrap_around_without_recompiling(device, backend):
    counter = CompileCounterWithBackend(backend)
    eager, compiled = Trainer(device), Trainer(device, counter)
    for step in range(20):
        if step == 3:
            warm = counter.frame_count
        assert_close_steps(compiled(), eager())
        torch.testing.assert_close(compiled.bank.queries(), eager.bank.queries())
        torch.testing.assert_close(compiled.bank.table(), eager.bank.table(), rtol=1e-4, atol=1e-4)
    assert 0 < warm == counter.frame_count
    assert int(compiled.bank.cursor[0]) == 20 * N % CAPACITY and len(compiled.bank) == CAPACITY


def test_aot_eager_gives_the_same_bits(device):
    """No fusion, no other order of sums: whatever differs would be a change of meaning."""
    eager, compiled = (Trainer(device, with_ids=True), Trainer(device, "aot_eager", with_ids=True))
    for _ in range(10):
        for a, b in zip(compiled(), eager(), strict=True):
            assert torch.equal(a, b)
    assert_same_state(compiled.bank, state(eager.bank))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["learn_temperature", "symmetric", "center_over"])
def test_banks_that_keep_more_compile_too(device, backend, kind):
    """Whole graphs, with a number for the temperature; the batches of an update are counted."""
    counter = CompileCounterWithBackend(backend)
    options = {"with_ids": True, "kinds": {kind: 5 if kind == "center_over" else True}}
    eager, compiled = (Trainer(device, with_, **options) for with_ in (None, counter))
    for step in range(12):
        if step == 3:
            warm = counter.frame_count
        assert_close_steps(compiled(), eager())
    assert 0 < warm == counter.frame_count
    for bank in (compiled.bank, compiled.bank.mirror or compiled.bank):
        assert len(bank) == CAPACITY
    if kind == "center_over":
        assert (compiled.bank.centering[1] == 12 % 5).all()
        assert_close_steps([compiled.bank.centering], [eager.bank.centering])
    if kind == "symmetric":
        mirror = compiled.bank.mirror
        assert torch.equal(mirror.queries(), compiled.bank.passages()[:, 0])


def test_other_batch_sizes_compile_at_most_once_more(device):
    counter = CompileCounterWithBackend("aot_eager")
    eager, compiled = Trainer(device), Trainer(device, counter)
    for n in (5, 5, 5, 3):
        assert_close_steps(compiled(n), eager(n))
    warm = counter.frame_count
    for n in (7, 2, 40, 9, 5):  # 40: more than the bank has
        assert_close_steps(compiled(n), eager(n))
    assert counter.frame_count <= warm + 1
    assert_same_state(compiled.bank, state(eager.bank))


@pytest.mark.parametrize("what", ["window", "temperature"])
def test_a_schedule_under_compile(device, what):
    """A window that grows, a temperature that is annealed: arguments that change between calls."""
    bank, plain = (ca.DualMemoryBank(CAPACITY, D, M, device=device) for _ in range(2))
    compiled = torch.compile(ca.contaccum_loss, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    for step in range(15):  # three temperatures: each is compiled anew
        if what == "window" and step % 5 == 4:
            bank.window = plain.window = 5 * step
        tau = 0.5 + 0.1 * (step // 5) if what == "temperature" else 0.5
        q, p = torch.randn(N, D, device=device), torch.randn(N, M, D, device=device)
        with torch.no_grad():
            assert torch.equal(compiled(q, p, bank, tau), ca.contaccum_loss(q, p, plain, tau))
    assert_same_state(bank, state(plain))


def test_the_module_compiles_in_both_modes(device):
    loss_fn, plain = (ca.ContAccumLoss(CAPACITY, D, M, device=device) for _ in range(2))
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    for training in (True, True, False, True):
        q, p = torch.randn(N, D, device=device), torch.randn(N, M, D, device=device)
        assert torch.equal(compiled.train(training)(q, p), plain.train(training)(q, p))
    assert_same_state(loss_fn.bank, state(plain.bank))


def copies_of_the_bank(code: str, bank: ca.DualMemoryBank) -> list[str]:
    """Lines of generated code that allocate as many elements as one of the bank's buffers has.

    Elements, not shapes: what inductor clones for an operator that mutates, it allocates flat.
    """
    sizes = {buffer.numel() for buffer in bank.buffers()}
    allocation = re.compile(r"empty_strided\w*\(\(([\d, ]*)\)")
    found = []
    for line in code.splitlines():
        for shape in allocation.findall(line):
            if math.prod(int(size) for size in shape.split(",") if size.strip()) in sizes:
                found.append(line.strip())
    return found


def bank_arguments(code: str) -> list[str]:
    """What the generated code hands to the operator as the bank's eight buffers."""
    (call,) = re.findall(r"banked_loss_\.default\((.*)\)", code)
    # A tensor may be wrapped in reinterpret_tensor(buf, (..), (..), 0): no comma within counts.
    depth, arguments = 0, [""]
    for character in call:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return [argument.strip() for argument in arguments[4:12]]


GRAPH_INPUT = re.compile(r"(primals_|arg)\d+(_1)?")


@needs_compiler
def test_inductor_hands_over_the_bank_itself(device):
    trainer = Trainer(device, "inductor")
    _, codes = run_and_get_code(trainer)
    (forward,) = [code for code in codes if "banked_loss_.default(" in code]
    assert not any(copies_of_the_bank(code, trainer.bank) for code in codes)
    assert all(GRAPH_INPUT.fullmatch(name) for name in bank_arguments(forward))


@needs_compiler
def test_the_look_at_generated_code_can_fail():
    """A step on copies, of which it returns one: both looks see all eight."""
    bank = ca.DualMemoryBank(CAPACITY, D, M)
    q, p = torch.randn(N, D), torch.randn(N, M, D)
    options = raw_arguments(bank)[12:]

    @torch.compile(backend="inductor", fullgraph=True)
    def on_copies(q, p):
        copies = [buffer.clone() for buffer in bank.buffers_in_order()[:8]]
        out = torch.ops.contaccum_ext.banked_loss_(q, p, None, None, *copies, *options)
        return out[0], copies[0]

    before = state(bank)
    (_, banked), (code,) = run_and_get_code(on_copies, q, p)
    assert torch.equal(banked[:N], q)
    assert_same_state(bank, before)
    assert len(copies_of_the_bank(code, bank)) == 8
    assert not any(GRAPH_INPUT.fullmatch(name) for name in bank_arguments(code))
