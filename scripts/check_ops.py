"""Load a built module and check that every op declared in csrc/ops.cpp can be called.

    python scripts/check_ops.py [PATH/TO/_C.abi3.so]

Each schema must be known to PyTorch's dispatcher and have a CPU kernel.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "contaccum_ext"


def declared_ops() -> set[str]:
    """Return the names in the ``m.def("name(...)...")`` lines of csrc/ops.cpp."""
    text = (ROOT / "csrc" / "ops.cpp").read_text(encoding="utf-8")
    return set(re.findall(r'\bm\.def\(\s*"(\w+)\s*\(', text))


def main() -> int:
    """Load, compare, report."""
    default = ROOT / NAMESPACE / "_C.abi3.so"
    torch.ops.load_library(sys.argv[1] if len(sys.argv) > 1 else default)
    prefix = f"{NAMESPACE}::"
    names = (name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names())
    known = {name[len(prefix) :] for name in names if name.startswith(prefix)}
    declared = declared_ops()
    faults = [f"{name}: not registered" for name in sorted(declared - known)]
    for name in sorted(known):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(prefix + name, "CPU"):
            faults.append(f"{name}: no CPU kernel")
    if not declared:
        faults.append("csrc/ops.cpp declares no op")
    print("\n".join(faults) or f"{len(known)} ops: {', '.join(sorted(known))}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
