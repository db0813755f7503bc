"""A page for the browser: one HTML file that needs no network."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from html import escape
from importlib import metadata
from pathlib import Path

PACKAGES = ("contaccum-ext", "torch", "transformers", "tokenizers", "numpy")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: top; }
th:first-child, td:first-child, .text td { text-align: left; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
code, .hit { font-family: ui-monospace, monospace; font-size: .82rem; }
.hit { margin: 0 0 .4rem; } .right { background: #dff3e3; }
details { margin: 1.6rem 0; } details p { margin: .5rem 0 .2rem; }
summary { cursor: pointer; font-weight: 600; }
"""


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page.

    Args:
        path: HTML file; its directory is made.
        title: of the page, as text.
        parts: HTML below the title.
    """
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join([f"<h1>{escape(title)}</h1>", *parts])
        + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def table(cells: Sequence[Sequence[str]], text: bool = False) -> str:
    """A table as HTML; the first line is its heading.

    Args:
        cells: text.
        text: align all columns to the left, not the first alone.
    """
    head, *body = cells
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in body
    )
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    kind = " class=text" if text else ""
    return f"<table{kind}><tr>{heading}</tr>{rows}</table>"


def figure(svg: str, caption: str) -> str:
    """A picture with text below it."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def versions() -> list[list[str]]:
    """What made the page, as cells of a table."""
    lines = [["", "version"], ["Python", platform.python_version()]]
    for package in PACKAGES:
        try:
            lines.append([package, metadata.version(package)])
        except metadata.PackageNotFoundError:
            lines.append([package, "not installed"])
    lines.append(["machine", f"{platform.machine()}, {os.cpu_count()} CPU cores"])
    return lines
