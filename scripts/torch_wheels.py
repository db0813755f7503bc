"""Install torch into a Python: a CPU build unless the machine can use another.

On Linux the default torch of the public package index brings gigabytes of CUDA libraries.
Where there is no NVIDIA driver they are of no use, so pip is first asked what it would
install, which takes the wheel's metadata and not the wheel.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# The version the project is tested with; any from 2.11 on will do.
TORCH = "torch==2.13.0"
INDEX_VARIABLE = "CONTACCUM_TORCH_INDEX"
CUDA_PACKAGES = re.compile(r"nvidia[-_]|cuda[-_]|triton\b", re.IGNORECASE)

NO_CPU_BUILD = f"""\
setup: this machine has no NVIDIA driver, so {TORCH} is wanted as a CPU build, and none was found:
  - the package index that pip uses: {{index}}
  - uv, which knows PyTorch's own index of CPU builds: {{uv}}
What helps, one of the two:
  - set {INDEX_VARIABLE} to the address of an index of PyTorch CPU wheels
    (PyTorch's "Get Started" page shows it for Linux, pip, CPU) and run this again;
  - run this from an environment that already has torch 2.11 or newer.
"""


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program], capture_output=True).returncode == 0


def unwanted_in_report(report: dict) -> list[str]:
    """Return the CUDA packages that the torch in pip's installation report requires."""
    requirements = []
    for item in report["install"]:
        if item["metadata"]["name"] == "torch":
            requirements += item["metadata"].get("requires_dist", [])
    return [text for text in requirements if CUDA_PACKAGES.match(text)]


def why_not_default_index(python: str) -> str | None:
    """Return what speaks against torch from pip's index, or None if it is a CPU build."""
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps"]
    # fast-deps reads the metadata out of the remote wheel where the index does not serve it.
    command += ["--use-feature=fast-deps", "--report", "-", TORCH]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        last = answer.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        return last[0]
    unwanted = unwanted_in_report(json.loads(answer.stdout))
    if unwanted:
        names = [re.split(r"[^\w-]", text)[0] for text in unwanted]
        return f"its torch requires {', '.join(names)}"
    return None


def why_not_uv(python: str) -> str | None:
    """Install the CPU build through uv, or return what went wrong."""
    get_uv = [python, "-m", "pip", "install", "--quiet", "uv"]
    if subprocess.run(get_uv, stdout=sys.stderr).returncode != 0:
        return "could not be installed"
    command = [python, "-m", "uv", "pip", "install", "--python", python]
    command += ["--torch-backend=cpu", TORCH]
    answer = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines() or ["no reason given"]
        return lines[0].removeprefix("error: ")
    return None


def install(python: str, say: Callable[[str], None]) -> None:
    """Install torch into ``python``, or stop with what the user can do about it."""
    pip = [python, "-m", "pip", "install"]
    index = os.environ.get(INDEX_VARIABLE)
    if index:
        say(f"installing {TORCH} from {INDEX_VARIABLE}")
        subprocess.run([*pip, "--index-url", index, TORCH], check=True, stdout=sys.stderr)
        return
    if platform.system() == "Linux" and not has_nvidia_driver():
        say("no NVIDIA driver: looking for a CPU build of torch")
        against_index = why_not_default_index(python)
        if against_index:
            say(f"not from pip's index ({against_index}); trying uv")
            against_uv = why_not_uv(python)
            if against_uv:
                sys.exit(NO_CPU_BUILD.format(index=against_index, uv=against_uv))
            return
    say(f"installing {TORCH}")
    subprocess.run([*pip, TORCH], check=True, stdout=sys.stderr)
