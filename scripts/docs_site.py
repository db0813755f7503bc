"""For mkdocs: takes into the site what pages of docs/ link to elsewhere in the repository.

A page says `](../examples/own_loop.py)`, which is right where the repository is read. The site has
no place above its root: such a file becomes part of the site, and the link is made to lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# The target of a link or picture; one with a colon is an address.
_LINK = re.compile(r"(\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig, **rest: Any) -> Files:
    """Add the files linked to, and those that they link to in turn."""
    root = Path(config.config_file_path).parent
    waiting = [
        (page.src_uri, Path(config.docs_dir, page.src_uri)) for page in files.documentation_pages()
    ]
    while waiting:
        uri, path = waiting.pop()
        for _, target in _LINK.findall(path.read_text(encoding="utf-8")):
            place, found = _place(uri, target), (path.parent / target).resolve()
            known = files.get_file_from_path(place) is not None
            if known or not (found.is_file() and found.is_relative_to(root)):
                continue  # what is missing, mkdocs says
            files.append(
                File.generated(
                    config, place, abs_src_path=str(found), inclusion=InclusionLevel.NOT_IN_NAV
                )
            )
            if found.suffix == ".md":
                waiting.append((place, found))
    return files


def on_page_markdown(markdown: str, page: Page, **rest: Any) -> str:
    """Change the links that lead out of the site's root."""
    here = posixpath.dirname(page.file.src_uri)

    def relink(found: re.Match[str]) -> str:
        place = _place(page.file.src_uri, found.group(2))
        return found.group(1) + posixpath.relpath(place, here or ".")

    return _LINK.sub(relink, markdown)


def _place(uri: str, target: str) -> str:
    """Where a link of the page at `uri` leads, in the site: what is above the root is put at it."""
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(uri), target))
    return re.sub(r"^(\.\./)+", "", joined)
