"""A run that is killed over and over ends with the bits of the run that never was."""

from __future__ import annotations

import random
import shutil
import signal
import time

from run_children import assert_same_run

from contaccum_ext.training import load_checkpoint

UPDATES = 70
KILLS = 22


def test_killed_at_random_moments_it_ends_as_if_it_never_had_been(runs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed-0"
    assert runs.train(tmp_path / "warm-up", updates=1) == 0
    began = time.perf_counter()
    assert runs.train(tmp_path / "start", updates=1) == 0
    start = time.perf_counter() - began
    began = time.perf_counter()
    assert runs.train(whole, UPDATES) == 0
    per_update = (time.perf_counter() - began - start) / UPDATES

    # Half of them at a moment in time, half at a call to the file system: a checkpoint makes some
    # thirty, each another place to be cut off. Each attempt gets a few updates further.
    chance = random.Random(0)
    kills = attempts = 0
    while kills < KILLS:
        attempts += 1
        assert attempts < 5 * KILLS
        if attempts % 2:
            code = runs.train(killed, UPDATES, die_at=chance.randint(1, 70))
        else:
            seconds = start + chance.uniform(-0.5 * start, 4 * per_update)
            code = runs.train(killed, UPDATES, seconds=seconds)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:  # where the machine has become faster since: the rest befalls another run
            assert_same_run(killed, whole)
            killed = tmp_path / f"killed-{attempts}"
    assert runs.train(killed, UPDATES) == 0
    assert_same_run(killed, whole)


def test_killed_at_any_call_to_the_file_system_it_ends_the_same(runs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.train(whole, updates=5) == 0
    for call in range(1, 200, 11):
        shutil.rmtree(killed, ignore_errors=True)
        code = runs.train(killed, updates=5, die_at=call)
        assert runs.train(killed, updates=5) == 0
        assert_same_run(killed, whole)
        if code == 0:  # it makes no more calls than that
            break
    assert code == 0 and call > 70


def test_leftovers_of_killed_writers_are_put_right(runs, tmp_path):
    run = tmp_path / "run"
    assert runs.train(run, updates=5) == 0
    names = sorted(path.name for path in run.iterdir())
    (run / "final").rename(run / ".final.old")  # killed between the two renames
    for name in (".final.new", ".checkpoint-000004.new", ".checkpoint-000002.removed"):
        (run / name).mkdir()
        (run / name / "half").write_text("")
    for path in (run, run / "final"):  # a reader finds it and changes nothing
        assert load_checkpoint(path).updates == 5
    assert not (run / "final").exists()
    assert runs.train(run, updates=5) == 0
    assert sorted(path.name for path in run.iterdir()) == names
    assert load_checkpoint(run / "final").updates == 5
