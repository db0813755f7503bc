"""A bank in each of several processes: its own history, whatever DistributedDataParallel does."""

from __future__ import annotations

import copy
import gc
import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from several_processes import COUNT, place, run_together
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainer_parts import make_trainer

import contaccum_ext as ca
from contaccum_ext.cli import main
from contaccum_ext.training import RunError

EPS = torch.finfo(torch.float64).eps
ACCUMULATION = 2
# Rows of each micro-batch: processes differ, and the last batches are what was left over.
ROWS = ((3, 5), (4, 4), (5, 3), (6, 2), (3, 4), (1, 2))


class Retriever(nn.Module):
    """An encoder with the loss inside, and with a buffer that the first process decides on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 4, dtype=torch.float64)
        self.loss = ca.ContAccumLoss(
            9, 4, 2, dtype=torch.float64, drift="mean", symmetric=True, learn_temperature=True
        )
        self.register_buffer("common", torch.zeros(()))

    def forward(self, questions, passages):
        return self.loss(self.encoder(questions), self.encoder(passages))


def micro_batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(10 * step + rank)
    n = ROWS[step][rank]
    options = {"generator": made, "dtype": torch.float64}
    return torch.randn(n, 6, **options), torch.randn(n, 2, 6, **options)


def micro_batch_here(step: int) -> list[torch.Tensor]:
    return [x.to(place()) for x in micro_batch(step, dist.get_rank())]


def updates(module, steps, synced: bool) -> list[float]:
    """Losses of this process's micro-batches, with an optimizer step after every second one."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for step in steps:
        last = step % ACCUMULATION == ACCUMULATION - 1
        with nullcontext() if last or not synced else module.no_sync():
            loss = module(*micro_batch_here(step))
            (loss / ACCUMULATION).backward()
        losses.append(loss.item())
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def train(resume_at: int | None):
    """In one process of the group; stopped and resumed from a state of its own, or not."""
    retriever = Retriever().to(place())
    module = DistributedDataParallel(ca.keep_banks_from_ddp(retriever))
    losses = updates(module, range(resume_at or len(ROWS)), synced=True)
    if resume_at is not None:
        state = copy.deepcopy(retriever.state_dict())
        retriever = Retriever().to(place())
        retriever.load_state_dict(state)  # before it is wrapped: the other process's may not come
        module = DistributedDataParallel(ca.keep_banks_from_ddp(retriever))
        losses += updates(module, range(resume_at, len(ROWS)), synced=True)
    retriever.common.fill_(dist.get_rank())
    with torch.no_grad():
        module(*micro_batch_here(0))
    return losses, retriever.state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, group_device):
    directory = tmp_path_factory.mktemp("trained") / "run"
    return run_together(directory, train, None, device=group_device)


def test_it_is_one_process_with_a_bank_for_each_and_the_mean_of_their_gradients(trained):
    """The full matrix over each process's own history, in plain PyTorch."""
    retriever = Retriever()
    parameters = [*retriever.encoder.parameters(), retriever.loss.learned.log_scale]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    banks = [ca.reference.DualMemoryBank(9, 4, 2, torch.float64, "mean", 0.9) for _ in range(COUNT)]
    expected = [[], []]
    for step in range(len(ROWS)):
        for rank, bank in enumerate(banks):
            queries, passages = map(retriever.encoder, micro_batch(step, rank))
            temperature = retriever.loss.learned()
            loss = ca.reference.contaccum_loss(queries, passages, bank, temperature, symmetric=True)
            (loss / ACCUMULATION / COUNT).backward()
            expected[rank].append(loss.item())
        if step % ACCUMULATION == ACCUMULATION - 1:
            optimizer.step()
            optimizer.zero_grad()
    for rank, (losses, state) in enumerate(trained):
        assert losses == pytest.approx(expected[rank], rel=1e4 * EPS)
        for name, value in retriever.encoder.state_dict().items():
            torch.testing.assert_close(state[f"encoder.{name}"], value, rtol=1e5 * EPS, atol=0)
        log_scale = state["loss.learned.log_scale"]
        torch.testing.assert_close(log_scale, parameters[-1].detach(), rtol=0, atol=1e4 * EPS)


def test_banks_differ_and_weights_and_other_buffers_do_not(trained):
    (_, first), (_, second) = trained
    for name, value in first.items():
        same = not name.startswith("loss.bank")
        if same or name.endswith(("bank_queries", "bank_passages", "means")):
            assert torch.equal(value, second[name]) == same, name
    assert second["common"] == 0  # DistributedDataParallel still sees to the others


def test_each_process_resumes_with_its_own_bank_to_the_bit(trained, group_device, tmp_path):
    resumed = run_together(tmp_path / "run", train, 4, device=group_device)
    for (losses, state), (expected, whole) in zip(resumed, trained, strict=True):
        assert losses == expected
        assert all(torch.equal(value, whole[name]) for name, value in state.items())


class WithBankBeside(nn.Module):
    """Encodes; the bank is in the module, but the loss is computed outside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.bank = ca.DualMemoryBank(9, 4)

    def forward(self, x):
        return self.encoder(x)


def with_wrappers_out_of_use(x):
    """What using a bank says, for wrappers that were discarded or never made."""
    said = {}
    module = WithBankBeside()
    gc.disable()  # it might happen to run in between
    wrapper = DistributedDataParallel(module)
    wrapper.__dict__["itself"] = wrapper  # only the garbage collector can find that it is unused
    del wrapper
    failed = DistributedDataParallel.__new__(DistributedDataParallel)
    try:
        failed.__init__(ca.DualMemoryBank(9, 4))
    except RuntimeError as error:
        said["failed"] = str(error)
    try:
        ca.contaccum_loss(module(x), module(x), module.bank)
    except (RuntimeError, AttributeError) as error:
        said["out of use"] = str(error)
    finally:
        gc.enable()
    return said


def refusals():
    """What using the bank says, for each way of wrapping the module around it."""
    said = {}
    x = torch.randn(3, 6)
    for name in ("wrapped", "not broadcast", "wrapped later", "kept"):
        module = WithBankBeside()
        options = {"broadcast_buffers": False} if name == "not broadcast" else {}
        if name == "wrapped later":
            for _ in range(7):
                ca.contaccum_loss(module(x), module(x), module.bank)
        if name == "kept":
            ca.keep_banks_from_ddp(module)
        wrapper = DistributedDataParallel(module, **options)
        before = module.bank.queries()
        try:
            vectors = wrapper(x)
            ca.contaccum_loss(vectors, vectors, module.bank).backward()
            said[name] = None
            assert len(module.bank) == 3
        except RuntimeError as error:
            said[name] = str(error)
            assert torch.equal(module.bank.queries(), before)
    wrapper = DistributedDataParallel(Retriever())
    try:
        wrapper(*micro_batch_here(0))
    except RuntimeError as error:
        said["inside"] = str(error)
    said |= with_wrappers_out_of_use(x)
    try:
        ca.keep_banks_from_ddp(wrapper)
    except TypeError as error:
        said["too late"] = str(error)
    return said


def test_banks_that_would_be_replaced_are_refused_in_every_process(tmp_path):
    for said in run_together(tmp_path / "run", refusals):
        assert said["not broadcast"] is said["kept"] is None
        assert said["wrapped later"] == said["wrapped"]
        assert "got bank.cursor of a DistributedDataParallel module" in said["wrapped"]
        assert "got loss.bank.cursor of a DistributedDataParallel module" in said["inside"]
        assert "keep_banks_from_ddp(module)" in said["inside"]
        assert "any parameter that requires a gradient" in said["failed"]
        assert "out of use" not in said
        assert said["too late"].endswith("to be wrapped, got a DistributedDataParallel")


def test_only_banks_are_put_on_the_list_and_those_on_it_stay():
    module = nn.Sequential(WithBankBeside(), nn.BatchNorm1d(4))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["1.running_mean"])
    assert ca.keep_banks_from_ddp(module) is module
    banks = {f"0.bank.{name}" for name, _ in module[0].bank.named_buffers()}
    assert {"0.bank.cursor", "0.bank.bank_queries"} < banks
    assert set(module._ddp_params_and_buffers_to_ignore) == banks | {"1.running_mean"}
    bank = ca.keep_banks_from_ddp(ca.DualMemoryBank(4, 2, symmetric=True))
    ignored = bank._ddp_params_and_buffers_to_ignore
    assert {*ignored} == {name for name, _ in bank.named_buffers()} > {"mirror.bank_queries"}


def test_modules_without_banks_are_refused():
    with pytest.raises(ValueError, match="module: expected one with banks inside, got Linear"):
        ca.keep_banks_from_ddp(nn.Linear(2, 2))


@pytest.mark.parametrize("command", ["train", "demo"])
def test_the_command_refuses_to_train_a_copy_in_each_process(
    command, start, tmp_path, monkeypatch, capsys
):
    options = ["--data", "stdlib", "--encoder", str(start)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, *options, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "WORLD_SIZE: expected 1, since this trainer runs in one process, got 2" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="got 2: each would train a copy"):
        make_trainer(start, tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "1")
    make_trainer(start, tmp_path / "run")


def train_here(start, output) -> str:
    del os.environ["WORLD_SIZE"]  # the group is there without it
    with pytest.raises(RunError) as said:
        make_trainer(start, output)
    return str(said.value)


def test_a_group_is_noticed_without_the_variable(start, tmp_path):
    for said in run_together(tmp_path / "run", train_here, start, tmp_path / "output"):
        assert "got 2: each would train a copy" in said
