"""Compile the CUDA kernels by plain nvcc: used by setup.py and by check_kernels.py.

Objects and what the assembler said about each kernel stay in ``build/kernels``, so that whoever
comes second finds them done.  Standard library only, no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "kernels"
# Machine code for 7.5, 8.x and 9.0; later GPUs compile the PTX of 8.0 when they first load it.
ARCHITECTURES = [
    "-gencode=arch=compute_75,code=sm_75",
    "-gencode=arch=compute_80,code=[compute_80,sm_80]",
    "-gencode=arch=compute_90,code=sm_90",
]
# Instructions that exist on Hopper alone, and only under this name of it.
HOPPER_SUFFIX = "_sm90a.cu"
HOPPER_ARCHITECTURES = ["-gencode=arch=compute_90a,code=sm_90a"]
# -v: registers and spills of every kernel go to the log.
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def read_sources(section: str) -> list[str]:
    """Return the paths listed under ``[section]`` in csrc/sources.txt."""
    sources: dict[str, list[str]] = {}
    current: list[str] = []
    for raw in (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if line.startswith("["):
            current = sources.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    return sources[section]


def cuda_toolkit() -> Path | None:
    """Return the directory of nvcc's toolkit; None without nvcc or where it is not wanted."""
    if os.environ.get("CONTACCUM_WITHOUT_CUDA"):
        return None
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    # nvcc itself says where it lives: the program found may be a wrapper script.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else None


def nvcc_flags(source: str) -> list[str]:
    """Return the options for one source file, which its name decides."""
    hopper = source.endswith(HOPPER_SUFFIX)
    return [*FLAGS, *(HOPPER_ARCHITECTURES if hopper else ARCHITECTURES)]


def log_of(target: Path) -> Path:
    """Return where nvcc's messages about an object are kept."""
    return target.with_suffix(".log")


def compile_kernels(toolkit: Path) -> list[Path]:
    """Compile the [cuda] sources that are newer than their objects, and return all objects."""
    folder = FOLDER / toolkit.name  # another release is another compiler
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in [*inputs, Path(__file__)])

    def compile_one(source: str) -> Path:
        target = folder / f"{Path(source).stem}.o"
        log = log_of(target)
        # The log is written last: where there is a log, the object beside it is whole.
        if log.exists() and log.stat().st_mtime >= newest:
            return target
        log.unlink(missing_ok=True)
        command = [toolkit / "bin" / "nvcc", *nvcc_flags(source), "-c", ROOT / source, "-o", target]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr)
            done.check_returncode()
        for line in done.stderr.splitlines():
            if "warning" in line:
                print(line, file=sys.stderr)
        log.write_text(done.stderr, encoding="utf-8")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, read_sources("cuda")))
