"""Check how the CUDA kernels were assembled: no GPU needed, only nvcc.

    python scripts/check_kernels.py [--all] [--accept]

Every source of the [cuda] section is compiled for every architecture (what a build left in
``build/kernels`` is used), and the assembler's figures are held against two lists:

- MUST_NOT_SPILL below: kernels whose inner loops may not touch local memory, whatever the compiler;
- scripts/known_spills.txt: every other spill, in bytes, as measured with the release of nvcc that
  the file names.  A kernel that spills more, or that is not there, fails; with another release the
  list is not applied.  ``--accept`` writes the file anew, for a reviewer to see in the diff.

What the assembler itself calls a potential loss of performance is a fault too.
Without ``--all`` the table leaves out kernels that keep to their registers.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import cuda_build

KNOWN_SPILLS = Path(__file__).with_name("known_spills.txt")
# (kernel, architecture), both as patterns.  A pattern that fits no kernel is an error.
MUST_NOT_SPILL = [
    # Hopper's query side, without offsets (0) and with them (1), for d of up to 768; passages (2
    # and 3) for all.
    ("attend_sm90a<*, (Side)[01], HopperTile<128, *>*", "sm_90a"),
    ("attend_sm90a<*, (Side)[01], HopperTile<384, *>*", "sm_90a"),
    ("attend_sm90a<*, (Side)[23], *>*", "sm_90a"),
    # By slices of d that a warp owns and eights of local vectors: all but the widest of both.
    ("attend_mma<*, 6, 4>", "sm_90"),
    ("attend_mma<*, 3, *>", "sm_[89]0"),
    ("attend_mma<*, 8, *>", "sm_[89]0"),
    ("attend_mma<*, 6, [12]>", "sm_[89]0"),
    ("attend_mma<*, false, *>", "sm_[89]0"),
    ("finish_queries<*>", "*"),
    ("finish_passages<*>", "*"),
    ("survey_scores<*>", "*"),
    ("weigh_*", "*"),
    ("keep_items<*>", "*"),
]


@dataclass
class Kernel:
    """What the assembler reports of one kernel on one architecture; sizes in bytes."""

    name: str
    arch: str
    stack: int = 0
    stores: int = 0  # spilled
    loads: int = 0
    registers: int = 0
    shared: int = 0  # static; what a launch asks for comes on top

    @property
    def local(self) -> tuple[int, int, int]:
        """Everything that is in local memory."""
        return (self.stack, self.stores, self.loads)


def parse(log: str) -> list[Kernel]:
    """Return the kernels in the messages of ``nvcc -Xptxas=-v``, names still mangled."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernels.append(Kernel(*found.groups()))
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            # Once for the kernel, once more for each function that it calls and does not inline.
            stack, stores, loads = map(int, found.groups())
            kernels[-1].stack += stack
            kernels[-1].stores += stores
            kernels[-1].loads += loads
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def losses(log: str) -> list[str]:
    """Return the assembler's complaints, such as products on Hopper that wait for one another."""
    return [line.strip() for line in log.splitlines() if "Potential Performance Loss" in line]


def short_name(demangled: str) -> str:
    """Return ``name<arguments>`` without return type, namespace and parameters."""
    text = demangled.replace("(anonymous namespace)::", "")
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:  # one in a template argument is a cast
            text = text[:i]
            break
    return re.sub(r"\bcontaccum::|__nv_|^void ", "", text)


def demangle(kernels: list[Kernel]) -> None:
    """Replace mangled names."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        sys.exit("check_kernels: expected cu++filt or c++filt on the PATH, found neither")
    names = "".join(f"{kernel.name}\n" for kernel in kernels)
    answer = subprocess.run([tool], input=names, check=True, capture_output=True, text=True).stdout
    for kernel, name in zip(kernels, answer.splitlines(), strict=True):
        kernel.name = short_name(name)


def must_not_spill(kernel: Kernel) -> bool:
    """Whether the first list has the kernel."""
    return any(
        fnmatchcase(kernel.name, name) and fnmatchcase(kernel.arch, arch)
        for name, arch in MUST_NOT_SPILL
    )


@dataclass
class Known:
    """The second list."""

    release: str
    spills: dict[tuple[str, str], tuple[int, int, int]]  # (arch, name): stack, stores, loads

    @classmethod
    def read(cls, text: str) -> Known:
        """Parse the file."""
        known = cls("", {})
        for line in text.splitlines():
            if line.startswith("nvcc "):
                known.release = line.split()[1]
            elif line and not line.startswith("#"):
                arch, stack, stores, loads, name = line.split(maxsplit=4)
                known.spills[arch, name] = (int(stack), int(stores), int(loads))
        return known

    def text(self) -> str:
        """Return the file."""
        lines = [
            "# Kernels that use local memory: bytes of stack, spill stores and spill loads.",
            "# Written by scripts/check_kernels.py --accept.",
            f"nvcc {self.release}",
        ]
        for (arch, name), numbers in sorted(self.spills.items()):
            lines.append(" ".join([f"{arch:7}", *(f"{x:5}" for x in numbers), name]))
        return "\n".join(lines) + "\n"


def faults(kernels: list[Kernel], known: Known, release: str) -> list[str]:
    """Return what is wrong, a line each."""
    found = []
    for name, arch in MUST_NOT_SPILL:
        fits = (fnmatchcase(k.name, name) and fnmatchcase(k.arch, arch) for k in kernels)
        if not any(fits):
            found.append(f"MUST_NOT_SPILL: no kernel is called {name} on {arch}")
    for kernel in kernels:
        what = f"{kernel.arch} {kernel.name}: {{}} bytes of stack, spill stores and loads"
        if must_not_spill(kernel):
            if any(kernel.local):
                found.append(f"{what.format(kernel.local)}, and may have none")
        elif release == known.release:
            most = known.spills.get((kernel.arch, kernel.name), (0, 0, 0))
            if any(now > before for now, before in zip(kernel.local, most, strict=True)):
                found.append(f"{what.format(kernel.local)}, known are {most}")
    return found


def table(kernels: list[Kernel]) -> str:
    """Return the kernels as text, a line each."""
    heads = ("arch", "regs", "stack", "stores", "loads", "shared", "kernel")
    rows = [heads]
    for k in sorted(kernels, key=lambda k: (k.arch, k.name)):
        rows.append((k.arch, *map(str, (k.registers, *k.local, k.shared)), k.name))
    return "\n".join(
        " ".join([f"{row[0]:7}", *(f"{cell:>6}" for cell in row[1:-1]), row[-1]]) for row in rows
    )


def release_of(toolkit: Path) -> str:
    """Return nvcc's release, such as 13.0."""
    command = [toolkit / "bin" / "nvcc", "--version"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", answer)
    return found[1] if found else "unknown"


def main() -> int:
    """Compile, compare, report."""
    parser = argparse.ArgumentParser(description="Check how the CUDA kernels were assembled.")
    parser.add_argument("--all", action="store_true", help="list kernels without spills too")
    parser.add_argument("--accept", action="store_true", help="write known_spills.txt anew")
    options = parser.parse_args()
    toolkit = cuda_build.cuda_toolkit()
    if toolkit is None:
        print("check_kernels: no nvcc found or wanted, nothing checked")
        return 0
    release = release_of(toolkit)
    objects = cuda_build.compile_kernels(toolkit)
    logs = [cuda_build.log_of(path).read_text(encoding="utf-8") for path in objects]
    kernels = [kernel for log in logs for kernel in parse(log)]
    demangle(kernels)
    if options.accept:
        spilling = [k for k in kernels if any(k.local) and not must_not_spill(k)]
        new = Known(release, {(k.arch, k.name): k.local for k in spilling})
        KNOWN_SPILLS.write_text(new.text(), encoding="utf-8")
    known = Known.read(KNOWN_SPILLS.read_text(encoding="utf-8"))
    print(table([k for k in kernels if options.all or any(k.local)]))
    if release != known.release:
        print(f"known_spills.txt is of nvcc {known.release}, this is {release}: not applied")
    wrong = faults(kernels, known, release) + [line for log in logs for line in losses(log)]
    clean = sum(not any(k.local) for k in kernels)
    print(f"{len(kernels)} kernels with nvcc {release}, {clean} of them without local memory")
    for fault in wrong:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
