"""The reference has every public name, and docstrings say what a caller has to know."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contaccum_ext.training.config_text import field_help

ROOT = Path(__file__).resolve().parent.parent
SENTENCE_TRANSFORMERS = "contaccum_ext.integrations.sentence_transformers"
MODULES = (
    "contaccum_ext",
    "contaccum_ext.reference",
    "contaccum_ext.training",
    SENTENCE_TRANSFORMERS,
)


def module_of(name: str) -> Any:
    if name == SENTENCE_TRANSFORMERS:
        pytest.importorskip("sentence_transformers", reason="not installed")
        pytest.importorskip("datasets", reason="not installed")
    return importlib.import_module(name)


def documented() -> set[str]:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    return {
        name
        for page in pages
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference_and_no_other(name):
    module = module_of(name)
    names = {public for public in module.__all__ if not inspect.ismodule(getattr(module, public))}
    assert names
    prefix = rf"{re.escape(name)}\.\w+"
    assert {entry for entry in documented() if re.fullmatch(prefix, entry)} == {
        f"{name}.{public}" for public in names
    }


def test_modules_of_the_reference_are_those_looked_at():
    assert {name.rpartition(".")[0] for name in documented()} == set(MODULES)


def functions_of(public: Any) -> Iterator[tuple[str, Callable]]:
    """The public functions of a class that are written here, or a function itself."""
    if inspect.isfunction(public):
        yield public.__name__, public
    if not inspect.isclass(public):
        return
    for owner in public.__mro__:
        if not owner.__module__.startswith("contaccum_ext"):
            continue
        for name, member in vars(owner).items():
            function = getattr(member, "__func__", member)  # of a class or static method
            if isinstance(member, (property, functools.cached_property)):
                function = getattr(member, "fget", None) or member.func
            if inspect.isfunction(function) and not name.startswith("_"):
                yield f"{public.__name__}.{name}", function


def lacks(name: str, documentation: str, function: Callable) -> list[str]:
    """What the documentation does not say of a function's arguments and result."""
    said = []
    for parameter in inspect.signature(function).parameters.values():
        if "Tensor" not in str(parameter.annotation):
            continue
        # `queries: (n, d)` in a list of arguments, or `queries (n, d)` in a sentence.
        shape = rf"\b{parameter.name}(: unused\.|:? [^.:]*?\([^()]+\))"
        if not re.search(shape, documentation):
            said.append(f"{name}: expected the shape of {parameter.name}")
    returns = str(inspect.signature(function).return_annotation)
    result = documentation.rpartition("Returns:")[2]
    if returns in ("Tensor", "tuple[Tensor, Tensor]") and not re.search(r"\([^()]*\)", result):
        said.append(f"{name}: expected the shape of the result")
    return said


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_give_shapes_arguments_and_errors(module):
    said = []
    for name in module_of(module).__all__:
        public = getattr(module_of(module), name)
        if not (inspect.isclass(public) or inspect.isfunction(public)):
            continue
        documentation = inspect.cleandoc(public.__doc__ or "")
        if not documentation or documentation.startswith(f"{name}("):
            said.append(f"{name}: expected a docstring")
        made = public.__init__ if inspect.isclass(public) else public
        if "__init__" in vars(public) or dataclasses.is_dataclass(public) or public is made:
            parameters = [key for key in inspect.signature(made).parameters if key != "self"]
            if name != "TrainConfig":  # whose arguments are explained by `field_help`
                said += [
                    f"{name}: expected {key} among its Args"
                    for key in parameters
                    if not re.search(rf"^    {key}: ", documentation, re.MULTILINE)
                ]
        for place, function in functions_of(public):
            if not inspect.getdoc(function):
                said.append(f"{place}: expected a docstring")
            said += lacks(place, inspect.getdoc(function) or "", function)
            raised = set(re.findall(r"raise (\w+Error)\(", inspect.getsource(function)))
            told = f"{documentation} {inspect.getdoc(function)}"
            said += [f"{place}: expected {e} to be told" for e in raised if e not in told]
    assert not said, "\n".join(said)


def test_the_settings_of_the_reference_are_those_of_the_trainer():
    page = (ROOT / "docs" / "reference" / "training.md").read_text(encoding="utf-8")
    shown = re.search(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert shown.group(1).splitlines() == field_help()


def test_pages_are_in_the_menu_and_the_menu_in_pages():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", menu, re.MULTILINE)) == pages


def test_links_of_the_pages_lead_somewhere():
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)[)#]", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_footnotes_are_there_and_are_used():
    for page in (ROOT / "docs").rglob("*.md"):
        found = re.findall(r"\[\^([\w-]+)\](:?)", page.read_text(encoding="utf-8"))
        told = [name for name, colon in found if colon]
        assert len(told) == len(set(told)), page.name
        assert set(told) == {name for name, colon in found if not colon}, page.name


def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "mkdocstrings_handlers.python"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{module} is not installed; the extra docs has it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "reference" / "contaccum_ext" / "index.html").read_text(encoding="utf-8")
    assert 'id="contaccum_ext.contaccum_loss"' in page
    assert (tmp_path / "examples" / "own_loop.py").is_file()
