"""``python -m benchmarks follow``: what it takes to move a bank along with its encoders.

After an update every banked vector is moved, and once a 32nd of the bank is new its table is
rebuilt (`contaccum_ext.transport`); beside that the losses of the update themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import contaccum_ext as ca
from benchmarks import report
from benchmarks.arguments import add_out, positive, sizes
from benchmarks.cases import DTYPES, TEMPERATURE
from benchmarks.ceilings import square_product_rate
from benchmarks.device import Device, open_device
from benchmarks.op import say
from contaccum_ext.staleness import REBUILD_PARTS

_SQUARE = {"cpu": 2048, "cuda": 8192}  # of the product that shows what the machine can do
_ROUNDS = 5


@dataclass(frozen=True)
class FollowOptions:
    """Of a run; an update has n * accumulation queries."""

    sizes: tuple[int, ...] = (1 << 10, 1 << 12, 1 << 14, 1 << 16)
    n: int = 8
    m: int = 2
    d: int = 384
    accumulation: int = 16
    probes: int = 64
    dtype: str = "fp32"

    @property
    def update(self) -> int:
        return self.n * self.accumulation

    def updates_between(self, slots: int) -> int:
        """From one rebuild of the table to the next."""
        return max(1, -(-slots // (REBUILD_PARTS * self.update)))


@dataclass(frozen=True)
class FollowRow:
    """Milliseconds for a full bank of so many slots."""

    slots: int
    losses_ms: float  # all of an update, with backward and enqueue
    move_ms: float
    move_floor_ms: float  # its products at the best rate seen
    rebuild_ms: float
    rebuild_floor_ms: float
    updates_between: int  # two rebuilds
    following_ms: float  # an update, on average: the move, and its share of a rebuild


def _median(device: Device, call: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Milliseconds of a call, after one for warmth."""
    device.burst(call, 1)
    return 1e3 * sorted(device.burst(call, 1)[0] for _ in range(rounds))[rounds // 2]


def _vectors(options: FollowOptions, device: Device, *shape: int) -> Tensor:
    kind = torch.float64 if options.dtype == "fp64" else torch.float32
    return normalize(torch.randn(*shape, options.d, device=device.name, dtype=kind), dim=-1)


def _full_bank(options: FollowOptions, device: Device, slots: int) -> ca.DualMemoryBank:
    bank = ca.DualMemoryBank(
        slots, options.d, options.m, DTYPES[options.dtype], device.name, "mean"
    )
    bank.bank_queries.copy_(_vectors(options, device, slots))
    bank.bank_passages.copy_(_vectors(options, device, slots, options.m))
    bank.cursor.copy_(torch.tensor([slots // 3, slots], device=device.name))
    return bank


def measure(options: FollowOptions, device: Device, slots: int, rate: float) -> FollowRow:
    """One size.

    Args:
        options: of the run.
        device: where.
        slots: of the bank, all filled.
        rate: operations per millisecond that products can have.
    """
    torch.manual_seed(0)
    bank = _full_bank(options, device, slots)
    q = _vectors(options, device, options.n).requires_grad_()
    p = _vectors(options, device, options.n, options.m).requires_grad_()
    old = _vectors(options, device, 2, options.probes)
    new = normalize(old + 0.01 * _vectors(options, device, 2, options.probes), dim=-1)

    def loss() -> None:
        batches = options.accumulation
        ca.contaccum_loss(q, p, bank, TEMPERATURE, center_over=batches).backward()

    def loss_and_rebuild() -> None:
        bank.vectors_changed()
        loss()

    def move() -> None:
        ca.transport(bank, old[0], new[0], old[1], new[1])

    step = _median(device, loss)
    rebuild = max(0.0, _median(device, loss_and_rebuild, 3) - step)
    moved = _median(device, move)
    between = options.updates_between(slots)
    return FollowRow(
        slots,
        options.accumulation * step,
        moved,
        2 * slots * (1 + options.m) * options.d * min(options.d, 2 * options.probes) / rate,
        rebuild,
        2 * slots**2 * options.m * options.d / rate,
        between,
        moved + rebuild / between,
    )


def page(header: dict[str, str], rows: list[FollowRow], options: FollowOptions, rate: float) -> str:
    """Markdown: what was run, and a line for each size."""
    told = "\n".join(f"- {key}: {value}" for key, value in header.items())
    head = [
        "slots",
        f"{options.accumulation} losses",
        "move",
        "floor",
        "rebuild",
        "floor",
        "every",
        "following, an update",
        "if rebuilt in every update",
    ]
    lines = [
        [
            f"{row.slots:,}",
            *(report.number(x) for x in (row.losses_ms, row.move_ms, row.move_floor_ms)),
            *(report.number(x) for x in (row.rebuild_ms, row.rebuild_floor_ms)),
            f"{row.updates_between} updates" if row.updates_between > 1 else "update",
            report.number(row.following_ms),
            report.number(row.move_ms + row.rebuild_ms),
        ]
        for row in rows
    ]
    shape = f"n = {options.n}, m = {options.m}, d = {options.d}, {options.dtype}"
    return f"""# Following the model: moving a bank, rebuilding its table

{told}

Milliseconds; medians of {_ROUNDS} (rebuilds of 3), with a wait for the device each. {shape},
updates of {options.update} queries, {options.probes} probes of queries and of passages.
*losses*: of an update, with backward and enqueue. *move*: `ca.transport`, fits included.
*rebuild*: what it adds to the next loss. *floor*: the same products at
{report.number(rate / 1e9, 4)} TFLOP/s, the best that a square product reached here.

{report.table(head, lines)}
"""


def add(commands) -> None:
    default = FollowOptions()
    parser = commands.add_parser(
        "follow",
        help="moving a bank along with its encoders, and rebuilding its table",
        description=__doc__,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--sizes", type=sizes, default=default.sizes, help="slots; default 1k,4k,16k,64k"
    )
    for name in ("n", "m", "d", "accumulation", "probes"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default=default.dtype, help="of the bank; default fp32"
    )
    add_out(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, command: list[str]) -> int:
    options = FollowOptions(**{x: getattr(args, x) for x in FollowOptions.__dataclass_fields__})
    device = open_device(args.device)
    header = report.environment(command, args.device) | device.describe()
    rate = square_product_rate(device, _SQUARE[device.name], DTYPES[options.dtype], _ROUNDS) / 1e3
    rows = []
    for slots in options.sizes:
        rows.append(measure(options, device, slots, rate))
        say(f"{slots:,} slots: {rows[-1]}")
    path = report.result_path(args.out, device.label(), "follow")
    report.write_csv(path.with_suffix(".csv"), header, rows, FollowRow)
    path.with_suffix(".md").write_text(page(header, rows, options, rate), encoding="utf-8")
    say(f"written: {path}.csv, .md")
    return 0
