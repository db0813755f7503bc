"""The check of assembled kernels, on messages of nvcc kept here: no compiler is needed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

SCRIPTS = str(Path(__file__).resolve().parent.parent / "scripts")
if SCRIPTS not in sys.path:  # scripts/ is not installed with the package
    sys.path.append(SCRIPTS)

import check_kernels as ck  # noqa: E402
import cuda_build  # noqa: E402

# Three kernels as nvcc 13.0 reports them; the last one calls a function that is not inlined.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9contaccum15attend_passagesI13__nv_bfloat16Li1ELi4EEE\
vNS_4ArgsIT_EE' for 'sm_75'
ptxas info    : Function properties for _ZN9contaccum15attend_passagesI13__nv_bfloat16Li1ELi4EEE\
vNS_4ArgsIT_EE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 120 registers, used 1 barriers, 6208 bytes smem, 720 bytes cmem[0]
ptxas info    : Compile time = 221.955 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9contaccum10attend_mmaI6__halfLb1ELi6ELi4EEE\
vNS_4ArgsIT_EEi' for 'sm_90'
ptxas info    : Function properties for _ZN9contaccum10attend_mmaI6__halfLb1ELi6ELi4EEE\
vNS_4ArgsIT_EEi
    104 bytes stack frame, 114 bytes spill stores, 104 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 104 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z5plainv' for 'sm_90a'
ptxas info    : Function properties for _Z5plainv
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z6calledv
    16 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 24 bytes cumulative stack size, 32 bytes smem
"""


def test_the_messages_of_the_assembler():
    kernels = ck.parse(LOG)
    assert [k.arch for k in kernels] == ["sm_75", "sm_90", "sm_90a"]
    assert [k.local for k in kernels] == [(0, 0, 0), (104, 114, 104), (24, 4, 12)]
    assert [k.registers for k in kernels] == [120, 255, 40]
    assert [k.shared for k in kernels] == [6208, 0, 32]
    assert kernels[2].name == "_Z5plainv"


def test_the_assemblers_own_complaints():
    line = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources in function '_Z5plainv'"
    )
    assert ck.losses(LOG) == []
    assert ck.losses(f"{LOG}{line}\n") == [line]


@pytest.mark.skipif(
    not (shutil.which("c++filt") or shutil.which("cu++filt")), reason="no demangler"
)
def test_names_are_demangled():
    kernels = ck.parse(LOG)
    ck.demangle(kernels)
    assert [k.name for k in kernels] == [
        "attend_passages<bfloat16, 1, 4>",
        "attend_mma<__half, true, 6, 4>",
        "plain",
    ]


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void contaccum::rows<float, 4>(contaccum::Args<float>)", "rows<float, 4>"),
        ("contaccum::(anonymous namespace)::zero(int*)", "zero"),
        ("void contaccum::enter<(contaccum::Entries)1>(int)", "enter<(Entries)1>"),
    ],
)
def test_short_names(demangled, short):
    assert ck.short_name(demangled) == short


def kernel(name: str, arch: str, spill: int = 0) -> ck.Kernel:
    return ck.Kernel(name, arch, stores=spill, loads=spill)


def test_the_list_of_known_spills_survives_a_round_trip():
    spills = {("sm_90", "attend<float, 1, 4>"): (16, 28, 32), ("sm_80", "b<1>"): (1000, 0, 0)}
    known = ck.Known("13.0", spills)
    assert ck.Known.read(known.text()) == known
    last = known.text().splitlines()[-1].split(maxsplit=4)
    assert last == ["sm_90", "16", "28", "32", "attend<float, 1, 4>"]


@pytest.fixture
def one_rule(monkeypatch):
    monkeypatch.setattr(ck, "MUST_NOT_SPILL", [("hot<*>", "sm_[89]0")])


# what spills, how much, what is known of it, and whether that is a fault
VERDICTS = {
    "a clean kernel": (("cold<1>", "sm_90", 0), 0, False),
    "a known spill": (("cold<1>", "sm_90", 8), 8, False),
    "less than known": (("cold<1>", "sm_90", 4), 8, False),
    "more than known": (("cold<1>", "sm_90", 9), 8, True),
    "not known": (("cold<1>", "sm_90", 1), None, True),
    "a hot kernel": (("hot<2>", "sm_90", 1), None, True),
    "a hot kernel, whatever is known": (("hot<2>", "sm_90", 1), 8, True),
    "a hot kernel where it does not matter": (("hot<2>", "sm_75", 1), 8, False),
    "on Hopper's own as elsewhere": (("cold<1>", "sm_90a", 1), 8, False),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_what_is_a_fault(one_rule, name):
    which, known, wrong = VERDICTS[name]
    spills = {} if known is None else {(which[1], which[0]): (0, known, known)}
    found = ck.faults([kernel(*which), kernel("hot<1>", "sm_80")], ck.Known("13.0", spills), "13.0")
    assert len(found) == wrong
    if wrong:
        assert which[0] in found[0] and which[1] in found[0]


def test_another_compiler_is_held_to_the_first_list_alone(one_rule):
    kernels = [kernel("hot<1>", "sm_80"), kernel("cold<1>", "sm_90", 99)]
    assert not ck.faults(kernels, ck.Known("13.0", {}), "13.1")
    kernels[0].stack = 8
    assert len(ck.faults(kernels, ck.Known("13.0", {}), "13.1")) == 1


def test_a_rule_for_a_kernel_that_is_gone_is_a_fault(one_rule):
    (found,) = ck.faults([kernel("cold<1>", "sm_80")], ck.Known("13.0", {}), "13.0")
    assert "hot<*>" in found


def test_the_list_in_the_repository_can_be_read():
    known = ck.Known.read(ck.KNOWN_SPILLS.read_text(encoding="utf-8"))
    assert known.release
    assert known.text() == ck.KNOWN_SPILLS.read_text(encoding="utf-8")
    for (arch, name), numbers in known.spills.items():
        assert any(numbers) and not ck.must_not_spill(ck.Kernel(name, arch))


def test_the_name_of_a_source_decides_its_architectures():
    plain = " ".join(cuda_build.nvcc_flags("csrc/cuda/launch.cu"))
    hopper = " ".join(cuda_build.nvcc_flags("csrc/cuda/attend_sm90a.cu"))
    assert all(name in plain for name in ("sm_75", "[compute_80,sm_80]", "sm_90"))
    assert "90a" not in plain
    assert hopper.count("-gencode") == 1 and "arch=compute_90a,code=sm_90a" in hopper
