"""When the losses center gradients, and over how many batches."""

from __future__ import annotations

import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from tiny_sentence_transformer import load

from contaccum_ext.integrations.sentence_transformers import ContAccumLoss


@pytest.fixture
def model(start):
    return load(start)


@pytest.mark.parametrize(
    ("options", "run", "over"),
    [
        ({}, None, 1),  # by probes, and nobody says how many batches make an update
        ({"drift": "mean"}, None, None),
        ({"center_gradients": True, "drift": "none"}, None, 1),
        ({}, (128, None, 16), 16),
        ({}, (32, None, 4), None),  # small updates: mean, eight updates
        ({"bank_size": 256}, (128, None, 16), 16),  # mean, two
        ({"bank_size": 4096}, (128, None, 16), 16),
        ({"bank_size": 4096, "drift": "mean"}, (128, None, 16), None),
        ({"bank_size": 128, "drift": "none"}, (128, None, 1), 1),
        ({"center_gradients": False}, (128, None, 16), None),
    ],
)
def test_gradients_are_centered_over_the_batches_of_an_update(model, options, run, over):
    memory = ContAccumLoss(model, **options).memory
    if run is not None:
        memory.begin_run(*run)
    assert memory.center_over == over


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"center_gradients": "yes"}, TypeError),
        ({"center_gradients": 1}, TypeError),
        ({"wide_epochs": -1}, ValueError),
        ({"wide_epochs": True}, ValueError),
        ({"wide_epochs": "all"}, ValueError),
    ],
)
def test_wrong_settings_of_centering_are_refused(model, options, kind):
    (name,) = options
    with pytest.raises(kind, match=f"{name}: expected 'auto'"):
        ContAccumLoss(model, **options)
