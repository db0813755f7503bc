"""Check that a wheel keeps the promise of docs/stable-abi.md.

The tag must be cp310-abi3, and the module may lean only on the C library family, on torch's
C functions, and on libtorch_cpu and libc10: no C++ symbol of torch, no libtorch_python.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TAG = "-cp310-abi3-"
MODULE = "contaccum_ext/_C.abi3.so"
ALLOWED = re.compile(r"lib(torch_cpu|torch|c10|stdc\+\+|gcc_s|c|m|pthread|dl|rt)\.so|ld-linux")
# Itanium-mangled names out of at::, c10:: or torch::, nested in other names or not.
TORCH_CPP = re.compile(r"\b_Z\w*?(2at|3c10|5torch)(?=\d|\w)")


def run(*command: str) -> str:
    """Return the output of a program that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults_of_module(path: Path) -> list[str]:
    """Return what is wrong with the shared object at ``path``."""
    needed = re.findall(r"NEEDED.*\[(.+?)\]", run("readelf", "--dynamic", "--wide", str(path)))
    faults = [f"links {name}" for name in needed if not ALLOWED.match(name)]
    undefined = run("nm", "--dynamic", "--undefined-only", str(path)).split()
    faults += [f"uses the C++ symbol {name}" for name in undefined if TORCH_CPP.match(name)]
    exported = run("nm", "--dynamic", "--defined-only", "--extern-only", str(path))
    if "PyInit__C" not in exported:
        faults.append("does not export PyInit__C")
    return faults


def faults_of_wheel(path: Path) -> list[str]:
    """Return what is wrong with the wheel at ``path``."""
    faults = [] if TAG in path.name else [f"the tag is not {TAG.strip('-')}"]
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        if MODULE not in wheel.namelist():
            return [*faults, f"{MODULE} is missing"]
        return faults + faults_of_module(Path(wheel.extract(MODULE, folder)))


def main() -> int:
    """Check the wheels named on the command line."""
    status = 0
    for argument in sys.argv[1:]:
        path = Path(argument)
        faults = faults_of_wheel(path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {'; '.join(faults) or 'good'}")
        status |= bool(faults)
    return status


if __name__ == "__main__":
    sys.exit(main())
