"""Run the format and type checks, all of them or those named: ruff, clang-format, mypy.

``--fix`` rewrites what can be rewritten and reports the rest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def commands(fix: bool) -> dict[str, list[list[str]]]:
    """Return the command lines behind each name."""
    files = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in NATIVE_SUFFIXES)
    native = sorted(str(path.relative_to(ROOT)) for path in files)
    ruff_format = ["ruff", "format", "."] if fix else ["ruff", "format", "--check", "."]
    ruff_check = ["ruff", "check", "--output-format=concise", *(["--fix"] if fix else []), "."]
    clang_format = ["-i"] if fix else ["--dry-run", "-Werror"]
    return {
        "ruff": [ruff_format, ruff_check],
        "clang-format": [["clang-format", *clang_format, *native]] if native else [],
        "mypy": [["mypy"]],
    }


def main() -> int:
    """Run the checks, each to its end, and return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    known = commands(options.fix)
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)}")
    failed = []
    for name in options.names or known:
        for command in known[name]:
            print("+", " ".join(command[:3]), flush=True)
            if subprocess.run(command, cwd=ROOT).returncode != 0:
                failed.append(name)
    if failed:
        print("failed:", ", ".join(dict.fromkeys(failed)), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
