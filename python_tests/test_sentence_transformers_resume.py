"""Banks in the Trainer's checkpoints: resuming goes on to the bit, anything else is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("datasets", reason="the Trainer needs datasets")


from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from tiny_sentence_transformer import (
    assert_same_bits,
    dataset,
    losses_of,
    memory,
    trainer,
    weights,
)

from contaccum_ext.integrations.sentence_transformers import (
    CachedContAccumLoss,
    ContAccumCallback,
    ContAccumLoss,
)
from contaccum_ext.integrations.sentence_transformers import callback as callback_module

FILE = "contaccum_banks.pt"

MEAN = {"bank_size": 24, "drift": "mean"}

LOSSES = {
    "plain": lambda m: ContAccumLoss(m, **MEAN),
    "cached": lambda m: CachedContAccumLoss(m, mini_batch_size=3, **MEAN),
    "matryoshka": lambda m: MatryoshkaLoss(m, ContAccumLoss(m, **MEAN), [16, 8]),
    "cached_matryoshka": lambda m: MatryoshkaLoss(
        m, CachedContAccumLoss(m, mini_batch_size=3, **MEAN), [16, 8]
    ),
    "symmetric": lambda m: ContAccumLoss(m, symmetric=True, **MEAN),
    "default": ContAccumLoss,
    # Probes are complete after 12 of the 24 rows before the checkpoint.
    "transport": lambda m: ContAccumLoss(m, bank_size=24, drift="transport", drift_probes=12),
    "cached_matryoshka_transport": lambda m: MatryoshkaLoss(
        m,
        CachedContAccumLoss(m, bank_size=24, mini_batch_size=3, drift="transport", drift_probes=12),
        [16, 8],
    ),
    # Half of them were taken before the checkpoint, half are taken after it.
    "late_transport": lambda m: ContAccumLoss(m, bank_size=24, drift="transport", drift_probes=48),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_resumed_run_ends_as_the_uninterrupted_one(two_layers, tmp_path, kind):
    """With dropout, whose random state the Trainer restores; three columns."""
    data = dataset(40, 1)
    whole = trainer(two_layers, tmp_path / "whole", LOSSES[kind], data=data)
    whole.train()
    broken = trainer(two_layers, tmp_path / "broken", LOSSES[kind], data=data, max_steps=3)
    broken.train()
    resumed = trainer(two_layers, tmp_path / "broken", LOSSES[kind], data=data)
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(whole)
    assert_same_bits(weights(resumed), weights(whole))
    for ours, theirs in zip(
        ContAccumCallback(resumed.loss).memories.values(),
        ContAccumCallback(whole.loss).memories.values(),
        strict=True,
    ):
        assert ours.filled() == theirs.filled() != {}
        if ours.probes is not None:
            assert ours.probes.sets[2].complete
        theirs = theirs.banks.state_dict()
        assert_same_bits(ours.banks.state_dict(), theirs)


def test_without_its_bank_the_resumed_run_would_end_elsewhere(start, tmp_path):
    """What the two tests around this one rely on."""
    whole = trainer(start, tmp_path / "run", LOSSES["plain"])
    whole.train()
    without = trainer(
        start, tmp_path / "run", LOSSES["plain"], lambda loss: ContAccumCallback(loss, resume=None)
    )
    without.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses_of(without)[3:] != losses_of(whole)[3:]


@pytest.fixture(scope="module")
def saved(start, tmp_path_factory) -> Path:
    """The output directory of a run stopped after three steps."""
    output = tmp_path_factory.mktemp("saved") / "run"
    trainer(start, output, LOSSES["plain"], max_steps=3).train()
    return output


def test_a_checkpoint_from_elsewhere_is_found_where_the_callback_is_told(start, saved, tmp_path):
    elsewhere = tmp_path / "moved"
    shutil.copytree(saved / "checkpoint-3", elsewhere)
    run = trainer(
        start,
        tmp_path / "new",
        LOSSES["plain"],
        lambda loss: ContAccumCallback(loss, resume=elsewhere),
        max_steps=4,
    )
    run.train(resume_from_checkpoint=str(elsewhere))
    assert memory(run).filled() == {"16x1": 24}
    named = trainer(
        start,
        tmp_path / "other",
        LOSSES["plain"],
        max_steps=4,
        resume_from_checkpoint=str(elsewhere),
    )
    named.train(resume_from_checkpoint=named.args.resume_from_checkpoint)
    assert_same_bits(weights(named), weights(run))


def test_banks_that_cannot_be_found_are_not_replaced_by_empty_ones(start, saved, tmp_path):
    there = tmp_path / "run"
    shutil.copytree(saved, there)
    (there / "checkpoint-3" / FILE).unlink()
    run = trainer(start, there, LOSSES["plain"])
    with pytest.raises(RuntimeError, match=r"goes on from step 3.*no such file.*resume=None"):
        run.train(resume_from_checkpoint=True)


def test_the_banks_of_other_weights_are_refused(start, saved, tmp_path):
    other = tmp_path / "other"
    trainer(start, other, LOSSES["plain"], max_steps=3, learning_rate=2e-3).train()
    # The new run's own directory holds a checkpoint of the same step, with other weights.
    run = trainer(start, other, LOSSES["plain"])
    with pytest.raises(RuntimeError, match="saved with other weights than those resumed from"):
        run.train(resume_from_checkpoint=str(saved / "checkpoint-3"))


@pytest.mark.parametrize(
    ("make_loss", "says"),
    [
        (lambda m: ContAccumLoss(m, bank_size=32, drift="mean"), "bank_size: expected 32, got 24"),
        (lambda m: ContAccumLoss(m, bank_size=24, drift="none"), "drift: expected 'none'"),
        (
            lambda m: ContAccumLoss(m, drift_decay=0.25, **MEAN),
            "drift_decay: expected 0.25, got 0.529",
        ),
        (LOSSES["matryoshka"], r"expected the banks of \['loss.memory'\], got \['memory'\]"),
    ],
)
def test_banks_saved_with_other_settings_are_refused(start, saved, make_loss, says):
    run = trainer(start, saved, make_loss, save_strategy="no")
    with pytest.raises(RuntimeError, match=says):
        run.train(resume_from_checkpoint=str(saved / "checkpoint-3"))


def test_a_checkpoint_without_probes_is_refused(start, saved, tmp_path):
    run = trainer(start, saved, LOSSES["transport"], save_strategy="no")
    with pytest.raises(RuntimeError, match="drift: expected 'transport', got 'mean'"):
        run.train(resume_from_checkpoint=str(saved / "checkpoint-3"))

    trainer(start, tmp_path, LOSSES["transport"], max_steps=3).train()
    file = tmp_path / "checkpoint-3" / FILE
    content = torch.load(file, weights_only=True)
    assert content["banks"]["memory"]["_extra_state"].pop("probes").keys() == {1}
    torch.save(content, file)
    run = trainer(start, tmp_path, LOSSES["transport"])
    with pytest.raises(RuntimeError, match="probes: expected those of drift='transport', got none"):
        run.train(resume_from_checkpoint=True)


def test_probes_of_another_number_are_refused(start, tmp_path):
    trainer(start, tmp_path, LOSSES["transport"], max_steps=3).train()
    run = trainer(start, tmp_path, LOSSES["late_transport"])
    with pytest.raises(RuntimeError, match="drift_probes: expected 48, got 12"):
        run.train(resume_from_checkpoint=True)


def changed(**changes):
    """Writes a file's content anew, with other values; those that are None are left out."""

    def write(file: Path) -> None:
        content = torch.load(file, weights_only=True) | changes
        torch.save({name: value for name, value in content.items() if value is not None}, file)

    return write


UNREADABLE = "cannot be read as a file of banks"
DAMAGE = {
    "a later format": (changed(format=2), "expected format 1, got 2"),
    "no format": (changed(format=None), "expected format 1, got None"),
    "no weights": (
        changed(weights=None),
        r"expected weights and a dict of banks, got \['banks', 'format'\]",
    ),
    "no banks": (
        changed(banks=None),
        r"expected weights and a dict of banks, got \['format', 'weights'\]",
    ),
    "banks in a list": (changed(banks=[1]), r"expected weights and a dict of banks, got \["),
    "banks without names": (
        changed(banks={1: {}, "memory": {}}),
        r"expected the banks of \['memory'\], got \['1', 'memory'\]",
    ),
    "no state": (
        changed(banks={"memory": 3}),
        r"the banks cannot be restored \(TypeError: Expected state_dict to be dict-like",
    ),
    "a list": (lambda file: torch.save([1], file), "expected a dict with banks, got list"),
    "empty": (lambda file: file.write_bytes(b""), rf"{UNREADABLE} \(EOFError\)"),
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        rf"{UNREADABLE} \(\w+Error: ",  # which one depends on where it ends
    ),
    "not a pickle": (
        lambda file: file.write_bytes(b"not a pickle"),
        rf"{UNREADABLE} \(UnpicklingError: Weights only load failed\)",
    ),
    "of another program": (lambda file: file.write_bytes(b"hello\n"), rf"{UNREADABLE} \("),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_not_as_it_should_be_is_named(start, saved, tmp_path, kind):
    there = tmp_path / "run"
    shutil.copytree(saved, there)
    damage, says = DAMAGE[kind]
    damage(there / "checkpoint-3" / FILE)
    with pytest.raises(RuntimeError, match=rf"checkpoint-3/{FILE}: {says}"):
        trainer(start, there, LOSSES["plain"]).train(resume_from_checkpoint=True)


def test_weights_that_cannot_be_read_are_told_of(start, saved):
    run = trainer(start, saved, LOSSES["plain"])
    run.state.global_step = 3
    model = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(RuntimeError, match=r"resume: the model's weights cannot be read \(NotImpl"):
        ContAccumCallback(run.loss).on_train_begin(run.args, run.state, run.control, model=model)


def test_a_write_that_fails_leaves_the_checkpoint_as_it_was(start, saved, tmp_path, monkeypatch):
    there = tmp_path / "checkpoint-3"
    shutil.copytree(saved / "checkpoint-3", there)
    before = {path.name: path.read_bytes() for path in there.iterdir() if path.is_file()}

    def half(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    run = trainer(start, tmp_path, LOSSES["plain"])
    run.state.global_step = 3
    callback = ContAccumCallback(run.loss)
    with pytest.raises(OSError, match="no space left"):
        callback.on_save(run.args, run.state, run.control, model=run.model)
    assert {path.name: path.read_bytes() for path in there.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_are_told_apart_by_any_one_of_them(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)).to(dtype)
    twin = copy.deepcopy(model)
    assert callback_module._fingerprint(twin) == callback_module._fingerprint(model)
    with torch.no_grad():
        twin[1].bias[2] = torch.nextafter(twin[1].bias[2], torch.tensor(9.0).to(dtype))
    assert callback_module._fingerprint(twin) != callback_module._fingerprint(model)
    swapped = torch.nn.Sequential(model[1], model[0])
    assert callback_module._fingerprint(swapped) != callback_module._fingerprint(model)


def test_a_checkpoint_that_is_not_where_it_should_be_gets_no_banks(start, tmp_path, caplog):
    run = trainer(start, tmp_path, LOSSES["plain"])
    run.state.global_step = 99
    ContAccumCallback(run.loss).on_save(run.args, run.state, run.control, model=run.model)
    assert "checkpoint-99 does not exist: the banks are not saved" in caplog.text
    assert not (tmp_path / "checkpoint-99").exists()


def test_checkpoints_of_weights_alone_get_no_banks(start, tmp_path):
    trainer(start, tmp_path, LOSSES["plain"], max_steps=3, save_only_model=True).train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-3" / FILE).exists()
