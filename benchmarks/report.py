"""Results as they are kept: names, the machine they were measured on, CSV and tables."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import contaccum_ext
from benchmarks.cases import MIB, Case
from benchmarks.op import Measured
from benchmarks.peers import Peer

RESULTS = Path(__file__).parent / "results"
VERDICTS = {True: "met", False: "MISSED", None: "not measured"}  # of a target


@dataclass(frozen=True)
class Row:
    """One peer at one size. Empty where it was not measured; `note` says why."""

    peer: str
    slots: int  # F
    n: int
    d: int
    m: int
    dtype: str
    drift: str
    repetitions: int | None
    ms_median: float | None
    ms_p20: float | None
    ms_p80: float | None
    cpu_ms_mean: float | None  # processor time over all threads
    gflops_per_s: float | None  # of the 8nFmd operations that are needed, whatever the peer does
    gbytes_per_s: float | None  # of reading both banks once
    floor_ms: float
    times_floor: float | None
    reading_gbytes_per_s: float
    multiplying_gflops_per_s: float
    extra_mib: float | None  # peak beyond bank, table and batch
    bank_mib: float
    table_mib: float | None
    note: str


def make_row(one: Measured) -> Row:
    case, t, floor = one.case, one.timing, one.ceilings.floor(one.case)
    return Row(
        peer=one.peer.name,
        **{
            key: value for key, value in asdict(case).items() if key not in ("drift", "center_over")
        },
        drift=case.corrections,
        repetitions=t.repetitions if t else None,
        ms_median=t.median * 1e3 if t else None,
        ms_p20=t.p20 * 1e3 if t else None,
        ms_p80=t.p80 * 1e3 if t else None,
        cpu_ms_mean=t.cpu_mean * 1e3 if t else None,
        gflops_per_s=case.operations() / t.median / 1e9 if t else None,
        gbytes_per_s=case.bank_bytes() / t.median / 1e9 if t else None,
        floor_ms=floor * 1e3,
        times_floor=t.median / floor if t else None,
        reading_gbytes_per_s=one.ceilings.best_reading()[1] / 1e9,
        multiplying_gflops_per_s=one.ceilings.best_multiplying()[1] / 1e9,
        extra_mib=None if one.extra_bytes is None else one.extra_bytes / MIB,
        bank_mib=case.bank_bytes() / MIB,
        table_mib=None if one.table_bytes is None else one.table_bytes / MIB,
        note=one.note,
    )


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int | None:
    """Of the largest cache of the first core; None where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1024, "M": MIB}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=None)


def environment(command: list[str], device: str) -> dict[str, str]:
    """What a number means nothing without."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cache = last_level_cache_bytes()
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m benchmarks " + " ".join(command),
        "device": device,
        "cpu": cpu_model(),
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "last-level cache": "unknown" if cache is None else f"{cache / MIB:.0f} MiB",
        "load average at start": load,
        "torch": torch.__version__,
        "contaccum_ext": contaccum_ext.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def installed(*packages: str) -> dict[str, str]:
    """Versions."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_csv(path: Path, header: dict[str, str], rows: Sequence[Any], kind: type = Row) -> None:
    """'# key: value' lines, then the names of the columns, then a line for each row.

    Args:
        path: written over.
        header: of the run.
        rows: dataclasses of that kind.
        kind: the dataclass, for its names, should there be no rows.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = asdict(row).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cells})


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What write_csv wrote: header and rows, as text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    rows = csv.DictReader(line for line in lines if not line.startswith("# "))
    return {key: value for key, value in comments}, list(rows)


def result_path(directory: Path, device: str, what: str) -> Path:
    """`directory`/date-device-what, without a suffix; numbered rather than written over."""
    directory.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).date()
    name, number = f"{date}-{device}-{what}", 1
    while list(directory.glob(f"{name}.*")):
        number += 1
        name = f"{date}-{device}-{what}-{number}"
    return directory / name


def what_was_run(case: Case) -> str:
    """'op', and what differs from the defaults."""
    parts = ["op"]
    default = Case(case.slots)
    for key, value in asdict(case).items():
        if value != getattr(default, key):
            parts.append(str(value) if isinstance(value, str) else f"{key}{value}")
    return "-".join(parts)


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    whole = len(str(int(abs(value))))
    decimals = digits - whole if abs(value) >= 1 else digits
    return f"{value:.{max(0, decimals)}f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown, columns padded so that it also reads as text."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    rule = ["-" * (width - 1) + ":" for width in widths]
    padded = [
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        for line in [head, rule, *lines]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def what_is_compared(peers: Sequence[Peer]) -> str:
    """Markdown: a section that says what each peer is and what it lacks."""
    lines = []
    for peer in peers:
        lacks = f" It lacks {peer.lacks}." if peer.lacks else ""
        lines.append(f"- **{peer.name}**: {peer.what}.{lacks}")
    return "## What is compared\n\n" + "\n".join(lines)
