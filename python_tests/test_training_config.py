"""Settings: what is accepted, what is refused and in which words, what is warned about."""

from __future__ import annotations

import re

import pytest

from contaccum_ext.bank_size import mean_decay
from contaccum_ext.training import METHODS, ConfigError, TrainConfig
from contaccum_ext.training.bank_width import bank_warnings
from contaccum_ext.training.config_text import (
    field_help,
    parse_assignments,
    read_yaml,
)


def test_unknown_key_is_refused_by_name_with_the_nearest_known_one():
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_mapping({"learning_rte": 1e-4}, "settings.yaml")
    expected = "settings.yaml: unknown key 'learning_rte'; did you mean 'learning_rate'?"
    assert str(caught.value) == expected


def test_unknown_key_without_a_near_one_lists_the_known():
    with pytest.raises(ConfigError, match=r"unknown key 'zzz'; known: method, local_batch_size, "):
        TrainConfig.from_mapping({"zzz": 1})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("local_batch_size", 0, "local_batch_size: expected an integer >= 1, got 0"),
        ("local_batch_size", "eight", "local_batch_size: expected an integer >= 1, got 'eight'"),
        ("local_batch_size", 8.0, "local_batch_size: expected an integer >= 1, got 8.0"),
        ("local_batch_size", True, "local_batch_size: expected an integer >= 1, got True"),
        ("bank_size", "big", "bank_size: expected an integer >= 1, or auto, got 'big'"),
        ("temperature", 0, "temperature: expected a number > 0, got 0"),
        ("temperature", "nan", "temperature: expected a number > 0, got 'nan'"),
        ("learning_rate", float("inf"), "learning_rate: expected a number > 0, got inf"),
        ("warmup_ratio", 1.5, "warmup_ratio: expected a number from 0 to 1, got 1.5"),
        ("normalize", 1, "normalize: expected true or false, got 1"),
        ("layers", 0, "layers: expected an integer >= 1, or null, got 0"),
        (
            "method",
            "dpr",
            f"method: expected one of {', '.join(METHODS)}, got 'dpr'",
        ),
        ("method", ["inbatch"], "got ['inbatch']"),
    ],
)
def test_unusable_value_names_key_expectation_and_what_came(key, value, message):
    with pytest.raises(ConfigError, match=re.escape(message) + "$"):
        TrainConfig(**{key: value})


def test_numbers_written_as_yaml_reads_them():
    config = TrainConfig.from_mapping(
        parse_assignments(["learning_rate=2e-4", "epochs=3", "bank_size=auto", "layers=null"])
    )
    assert (config.learning_rate, config.epochs) == (2e-4, 3)
    assert (config.bank_size, config.layers) == ("auto", None)


@pytest.mark.parametrize("assignment", ["epochs", "=3"])
def test_assignment_without_key_and_value_is_refused(assignment):
    with pytest.raises(ConfigError, match=f"--set: expected key=value, got '{assignment}'"):
        parse_assignments([assignment])


def test_settings_of_0_1_are_still_read():
    for value, precision in ((True, "bf16"), (False, "fp32")):
        assert TrainConfig.from_mapping({"bf16": value, "seed": 3}).precision == precision
    for values in ({"bf16": True, "precision": "fp16"}, {"bf16": "yes"}):
        with pytest.raises(ConfigError, match=r"old\.yaml: bf16: expected 'precision: bf16'"):
            TrainConfig.from_mapping(values, "old.yaml")


def test_round_trip_through_a_mapping():
    config = TrainConfig(method="prebatch", learning_rate=3e-4, layers=2)
    assert TrainConfig.from_mapping(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "expected 'key: value' lines, got list"),
        ("a: [1\n", "not YAML"),
    ],
)
def test_yaml_that_is_no_mapping(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_file_that_is_missing_or_empty(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(
    ("settings", "queries", "capacity"),
    [
        ({}, 100_000, 4 * 128),
        ({"accumulation_steps": 8}, 100_000, 4 * 64),
        ({"accumulation_steps": 7}, 100_000, 8 * 56),
        ({"accumulation_steps": 7, "local_batch_size": 16}, 100_000, 4 * 112),
        ({"accumulation_steps": 4}, 100_000, 8 * 32),
        ({}, 200, 200),
        ({"bank_size": 4096}, 500, 4096),
    ],
)
def test_automatic_bank_is_some_updates_and_at_most_the_training_set(settings, queries, capacity):
    assert TrainConfig(**settings).bank_capacity(queries) == capacity


@pytest.mark.parametrize(
    ("settings", "capacity", "centers"),
    [
        ({}, 10**6, True),  # with probes
        ({"drift": "transport"}, 128, True),
        ({"drift": "mean"}, 2 * 128, True),
        ({"drift": "mean"}, 2 * 128 + 1, False),
        ({"drift": "none"}, 128, True),
        ({"drift": "none"}, 128 + 1, False),
        ({"accumulation_steps": 4}, 8 * 32, False),  # mean, where updates are small
        ({"accumulation_steps": 4}, 2 * 32, True),
        ({"drift": "none", "clear_bank_every_update": True}, 10**6, True),
        ({"drift": "mean", "center_gradients": True}, 10**6, True),
        ({"center_gradients": False}, 128, False),
    ],
)
def test_gradients_are_centered_where_nothing_else_tells_old_from_new(settings, capacity, centers):
    assert TrainConfig(**settings).centers_for(capacity) is centers


@pytest.mark.parametrize(
    ("settings", "capacity", "epochs"),
    [
        ({}, 4096, 3),
        ({"row_weighting": "all"}, 4096, 0),
        ({"drift": "mean", "row_weighting": "all"}, 4096, None),
        ({"drift": "none"}, 4096, None),
        ({"wide_epochs": 0}, 4096, 0),
        ({"drift": "mean", "wide_epochs": 5}, 256, 5),
    ],
)
def test_a_large_bank_is_whole_for_some_epochs(settings, capacity, epochs):
    assert TrainConfig(**settings).wide_epochs_for(capacity) == epochs


@pytest.mark.parametrize(
    ("settings", "capacity", "says"),
    [
        ({}, 128 * 128, None),
        ({}, 128 * 128 + 1, "has not been tried over so many updates"),
        ({"center_gradients": False}, 4 * 128, None),
        ({"center_gradients": False}, 4 * 128 + 1, "short, slow or overfitting training"),
        ({"row_weighting": "all"}, 128 * 128, None),
        ({"accumulation_steps": 4}, 128 * 32, None),
        ({"accumulation_steps": 4}, 128 * 32 + 1, "has not been tried over so many updates"),
        ({"drift": "mean"}, 2 * 128, None),
        ({"drift": "mean"}, 2 * 128 + 1, "set drift=auto, or bank_size to at most 256"),
        ({"drift": "mean"}, 8 * 128, "lost up to 0.07 NDCG@10 after 40 updates"),
        ({"drift": "mean"}, 8 * 128 + 1, "set drift=transport, or bank_size to at most 1024"),
        ({"drift": "mean", "accumulation_steps": 4}, 8 * 32, None),
        ({"drift": "none"}, 2 * 128, None),
        ({"drift": "none"}, 2 * 128 + 1, "set drift=auto, or bank_size to at most 256"),
        ({"method": "prebatch", "drift": "none"}, 1024, "retrieval quality may collapse"),
        ({"method": "gradaccum", "drift": "none"}, 10**6, None),
        ({"method": "gradcache", "drift": "none"}, 10**6, None),
        (
            {"method": "gradcache_contaccum", "drift": "none"},
            1024,
            "retrieval quality may collapse",
        ),
        ({"clear_bank_every_update": True, "drift": "none"}, 10**6, None),
    ],
)
def test_a_bank_wider_than_its_drift_correction_bears_warns_in_words(settings, capacity, says):
    warned = bank_warnings(TrainConfig(**settings), capacity)
    if says is None:
        assert warned == []
    else:
        assert len(warned) == 1
        assert says in warned[0]
        assert f"bank_size {capacity} keeps vectors up to" in warned[0]


@pytest.mark.parametrize(
    ("settings", "capacity", "drift"),
    [
        ({}, 2 * 128, "mean"),
        ({}, 2 * 128 + 1, "transport"),
        ({"accumulation_steps": 8}, 2 * 64 + 1, "transport"),
        ({"accumulation_steps": 4}, 8 * 32, "mean"),
        ({"accumulation_steps": 4}, 8 * 32 + 1, "transport"),
        ({"clear_bank_every_update": True}, 4096, "mean"),
        ({"drift": "none"}, 4096, "none"),
        ({"drift": "transport"}, 64, "transport"),
    ],
)
def test_automatic_drift_correction_goes_by_the_age_of_the_bank(settings, capacity, drift):
    assert TrainConfig(**settings).drift_for(capacity) == drift


def test_help_has_a_line_for_every_setting():
    lines = field_help()
    assert [line.split("=")[0] for line in lines] == list(TrainConfig().to_dict())
    assert "epochs=1: passes over the training queries (an integer >= 1)" in lines
    assert any(line.startswith("normalize=true: ") for line in lines)
    assert any(line.startswith("bank_size=auto: ") for line in lines)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 16, 128])
def test_running_means_lag_by_nine_sixteenths_of_an_update(micro_batches):
    decay = mean_decay(micro_batches)
    assert decay / (1 - decay) == pytest.approx(9 / 16 * micro_batches)
    assert mean_decay(16) == pytest.approx(0.9)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 16, 128])
def test_predicted_means_are_averages_over_two_updates(micro_batches):
    decay = mean_decay(micro_batches, predicted=True)
    assert decay / (1 - decay) == pytest.approx(2 * micro_batches)
