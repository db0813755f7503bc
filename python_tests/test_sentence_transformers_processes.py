"""SentenceTransformerTrainer in two processes: a bank in each, of its own rows, also resumed."""

from __future__ import annotations

import logging
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("datasets", reason="the Trainer needs datasets")

from packaging.version import Version
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from several_processes import COUNT, place, run_together
from tiny_sentence_transformer import (
    ACCUMULATION,
    BATCH,
    EPS,
    PAIRS,
    STEPS,
    assert_same_bits,
    bank_state,
    dataset,
    embed,
    identities,
    load,
    losses_of,
    memory,
    oracle,
    recorded,
    texts,
    trainer,
    weights,
)

from contaccum_ext import mean_decay, reference
from contaccum_ext.integrations.sentence_transformers import ContAccumCallback, ContAccumLoss

LEARNING_RATE = 1e-4  # of plain gradient descent, with gradients of norm 200
FILES = ("contaccum_banks_0_of_2.pt", "contaccum_banks_1_of_2.pt")


def train(start, output, kind):
    """Eight updates of 8 rows, two in an epoch, with a bank of 20 slots that wraps around."""
    make = lambda m: recorded(kind)(m.double(), bank_size=20, drift="mean")  # noqa: E731
    run = trainer(
        start,
        output,
        make,
        data=dataset(32, 1),
        device=place().type,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        max_grad_norm=0.0,
        save_strategy="no",
    )
    run.train()
    banks = {name: value.clone() for name, value in bank_state(run).items()}
    run.evaluate(dataset(8, 1))
    assert_same_bits(bank_state(run), banks)
    bank = memory(run).banks["16x2"]
    return {
        "seen": run.loss.seen,
        "queries": bank.queries(),
        "passages": bank.passages(),
        "weights": weights(run),
        "logged": losses_of(run),
    }


@pytest.mark.parametrize("kind", PAIRS)
def test_it_is_one_process_with_a_bank_for_each_and_the_mean_of_their_losses(
    start, tmp_path, kind, group_device
):
    """Each batch's loss, by the full matrix over what that process had seen, weights at the end."""
    if kind == "cached" and Version(version("sentence-transformers")) < Version("6.2"):
        pytest.skip("before 6.2 cached gradients go through float32 in sentence-transformers")
    output = tmp_path / "output"
    found = run_together(tmp_path / "run", train, start, output, kind, device=group_device)
    model = load(start).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    decay = mean_decay(ACCUMULATION)
    banks = [
        reference.DualMemoryBank(20, 16, 2, torch.float64, "mean", decay) for _ in range(COUNT)
    ]
    for step in range(STEPS):
        total = 0.0
        for batch in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
            for result, bank in zip(found, banks, strict=True):
                columns, value = result["seen"][batch]
                assert len(columns[0]["input_ids"]) == BATCH
                loss = oracle(bank, embed(model, columns), identities(columns[1:]))
                assert value == pytest.approx(loss.item(), rel=1e5 * EPS)
                (loss / ACCUMULATION / COUNT).backward()
                total += loss.item() / ACCUMULATION / COUNT
        optimizer.step()
        optimizer.zero_grad()
        assert found[0]["logged"][step] == pytest.approx(total, rel=1e-6)  # as the log has it
    for result, bank in zip(found, banks, strict=True):
        for name in ("queries", "passages"):
            expected = getattr(bank, name)()
            torch.testing.assert_close(result[name], expected, rtol=0, atol=1e5 * EPS)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=1e5 * EPS)
    assert not torch.equal(found[0]["queries"], found[1]["queries"])
    # The four batches of an epoch: no row in both processes.
    rows = [row for result in found for c, _ in result["seen"][:4] for row in texts(c[0])]
    assert len(rows) == len(set(rows)) == 32


def everything(model):
    """Sizes, probes, moved banks, both directions."""
    options = {"drift": "transport", "drift_probes": 6, "symmetric": True}
    return MatryoshkaLoss(model, recorded("cached")(model, bank_size=24, **options), [16, 8])


def state_of(run) -> dict:
    kept = run.loss.loss.memory
    return {
        "losses": losses_of(run),
        "weights": weights(run),
        "memory": kept.state_dict(),
        "probes": texts_of_probes(kept),
        "anchors": [texts(columns[0]) for columns, _ in run.loss.loss.seen[:2]],
    }


def texts_of_probes(kept) -> list[tuple]:
    return [row for part in kept.probes.sets[2].batches[0] for row in texts(part)]


def interrupt(start, output: Path):
    """A run whole, resumed, and then resumed with the second process's banks broken, and gone."""
    found = {}
    data = dataset(40, 1)
    rank = torch.distributed.get_rank()
    whole = trainer(start, output / "whole", everything, data=data)
    whole.train()
    found["whole"] = state_of(whole)
    trainer(start, output / "part", everything, data=data, max_steps=3).train()
    checkpoint = output / "part" / "checkpoint-3"
    torch.distributed.barrier()
    found["files"] = sorted(path.name for path in checkpoint.glob("contaccum*"))
    run = trainer(start, output / "part", everything, data=data)
    run.train(resume_from_checkpoint=True)
    found["resumed"] = state_of(run)
    for damage in ("truncated", "gone"):
        torch.distributed.barrier()
        if rank == 1:
            content = (checkpoint / FILES[1]).read_bytes()
            (checkpoint / FILES[1]).unlink()
            if damage == "truncated":
                (checkpoint / FILES[1]).write_bytes(content[: len(content) // 2])
        torch.distributed.barrier()
        run = trainer(start, output / "part", everything, data=data, save_strategy="no")
        with pytest.raises(RuntimeError) as said:
            run.train(resume_from_checkpoint=str(checkpoint))
        found[damage] = str(said.value)
    return found


def test_each_process_resumes_with_its_own_banks_to_the_bit(two_layers, tmp_path):
    """With dropout, and with banks that each process moves by probes of its own."""
    both = run_together(tmp_path / "run", interrupt, two_layers, tmp_path)
    for found in both:
        whole, resumed = found["whole"], found["resumed"]
        assert resumed["losses"] == whole["losses"]
        assert_same_bits(resumed["weights"], whole["weights"])
        assert_same_state(resumed["memory"], whole["memory"])
        assert resumed["probes"] == whole["probes"]
        assert whole["probes"] == [row for rows in whole["anchors"] for row in rows][:6]
        assert found["files"] == list(FILES)
        assert f"{FILES[1]}: no such file" in found["gone"]
        assert f"{FILES[1]}: cannot be read as a file of banks (" in found["truncated"]
    first, second = both
    for damage in ("truncated", "gone"):
        assert first[damage] == second[damage]
        assert first[damage].startswith("process 1: resume: the run goes on from step 3, but its")
    assert_same_bits(first["whole"]["weights"], second["whole"]["weights"])
    assert first["whole"]["probes"] != second["whole"]["probes"]
    name = "banks.16x2.bank_queries"
    assert not torch.equal(first["whole"]["memory"][name], second["whole"]["memory"][name])


def assert_same_state(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_same_state(ours[name], theirs[name])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_same_state(*pair)
    else:
        assert ours == theirs


def as_process(monkeypatch, run, process, count) -> None:
    monkeypatch.setattr(type(run.args), "world_size", count)
    monkeypatch.setattr(type(run.args), "process_index", process)


PLAIN = {"bank_size": 24}


@pytest.fixture(scope="module")
def saved(start, tmp_path_factory) -> Path:
    """The output directory of a run of one process, stopped after three steps."""
    output = tmp_path_factory.mktemp("saved") / "run"
    trainer(start, output, lambda m: ContAccumLoss(m, **PLAIN), max_steps=3).train()
    return output


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_another_number_of_processes_is_refused_or_begins_with_empty_banks(
    start, saved, tmp_path, monkeypatch, before, now
):
    checkpoint = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(saved / "checkpoint-3", checkpoint)
    run = trainer(start, tmp_path / "run", lambda m: ContAccumLoss(m, **PLAIN))
    run.state.global_step = 3
    if before > 1:
        (checkpoint / "contaccum_banks.pt").unlink()
        for process in range(before):
            as_process(monkeypatch, run, process, before)
            ContAccumCallback(run.loss).on_save(run.args, run.state, run.control, model=run.model)
    as_process(monkeypatch, run, 0, now)
    says = rf"saved by {before} process\(es\), each with its own rows .* this run has {now}\)"
    with pytest.raises(RuntimeError, match=says):
        ContAccumCallback(run.loss).on_train_begin(
            run.args, run.state, run.control, model=run.model
        )
    empty = ContAccumCallback(run.loss, resume=None)
    empty.on_train_begin(run.args, run.state, run.control, model=run.model)
    assert memory(run).filled() == {}


@pytest.mark.parametrize(
    ("rows", "count", "split", "capacity"),
    [(40, 1, False, 40), (40, 3, False, 14), (99, 3, True, 8 * ACCUMULATION)],
)
def test_an_automatic_bank_is_at_most_the_processs_part_of_the_training_set(
    start, tmp_path, monkeypatch, rows, count, split, capacity
):
    """With split_batches the batch of 4 is that of all three processes: a row for each."""
    config = {"accelerator_config": {"split_batches": split}}
    run = trainer(start, tmp_path, ContAccumLoss, **config)
    as_process(monkeypatch, run, 0, count)
    ContAccumCallback(run.loss).on_train_begin(
        run.args,
        run.state,
        run.control,
        model=run.model,
        train_dataloader=torch.utils.data.DataLoader(dataset(rows)),
    )
    assert memory(run).capacity == capacity


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_a_training_set_that_cannot_tell_its_length_is_of_unknown_size(start, tmp_path, error):
    class Wrapper(torch.utils.data.Dataset):
        def __len__(self):
            raise error("of a part that has none")

    run = trainer(start, tmp_path, ContAccumLoss)
    ContAccumCallback(run.loss).on_train_begin(
        run.args,
        run.state,
        run.control,
        model=run.model,
        train_dataloader=torch.utils.data.DataLoader(Wrapper()),
    )
    assert memory(run).capacity == 8 * BATCH * ACCUMULATION


def test_warnings_say_whose_bank_they_are_about(start, tmp_path, monkeypatch, caplog):
    """Of the size, which is that of all, only the first process speaks."""
    run = trainer(start, tmp_path, lambda m: ContAccumLoss(m, bank_size=400, drift="none"))
    for process, warned in ((0, 1), (1, 0)):
        caplog.clear()
        as_process(monkeypatch, run, process, 2)
        callback = ContAccumCallback(run.loss)
        with caplog.at_level(logging.WARNING, logger="contaccum_ext"):
            callback.on_train_begin(run.args, run.state, run.control, model=run.model)
            assert len(caplog.messages) == warned
            run.state.log_history = [{"loss": 1.0}]
            monkeypatch.setattr(callback._readings, "take", lambda: ({}, ["too old"]))
            callback.on_log(run.args, run.state, run.control, {"loss": 1.0})
        assert caplog.messages[warned:] == [f"process {process}: too old"]
