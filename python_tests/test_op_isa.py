"""Every instruction set that the CPU kernels are compiled for, not only this processor's widest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HISTORIES = """
import torch
import contaccum_ext as ca
from dataclasses import replace
from strategies import Setup, Step
from twins import Twins

torch.set_num_threads(1)
LAPS = [Step("loss", n) for n in (3, 5, 1, 8, 2, 7, 4, 6, 30)]
F32, F64 = torch.float32, torch.float64
for d in (1, 16, 33, 100):
    for bank, given in ((F32, F32), (F64, F64), (torch.bfloat16, F32), (torch.float16, F32)):
        for drift in ("none", "mean"):
            layout = ca.BankLayout(2, 4, 8)
            setup = Setup(23, d, 2, layout, bank, given, drift, True, seed=d)
            for learn in (False, True):
                twins = Twins(replace(setup, learn=learn), "cpu")
                for step in LAPS:
                    twins.run(step)
twins = Twins(Setup(100, 384, 2, None, F32, F32, size=0.2), "cpu")
for n in (100, 1500):  # dp in two passes
    twins.run(Step("loss", n))
print("agreed")
"""


def run(isa: str) -> subprocess.CompletedProcess:
    """In a process of its own: the choice is made once."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + HISTORIES
    environment = {**os.environ, "CONTACCUM_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_histories_with_one_instruction_set(isa):
    done = run(isa)
    if done.returncode and f"got {isa}" in done.stderr:
        pytest.skip(f"the processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agreed\n"


def test_an_unknown_instruction_set_is_refused_by_name():
    done = run("mmx")
    assert done.returncode != 0
    assert "CONTACCUM_CPU_ISA" in done.stderr and "mmx" in done.stderr
