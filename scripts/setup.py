"""Set up everything the project needs, once, and then run a command in that environment.

    python3 scripts/setup.py [--extra NAME]... [COMMAND [ARGUMENT]...]

Which Python is used, in this order:

1. the running one, if it belongs to a virtual or conda environment that has torch;
2. ``.venv`` in the repository, made if need be.  A system Python that has torch lends it to
   ``.venv``; otherwise torch is installed there: the default build where there is an NVIDIA
   driver, a CPU build where there is none.  No CUDA libraries are fetched in vain.

The extension is then built and installed in editable form.  A stamp in ``build/`` remembers
what was done, so that a second run only checks it.  Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch_wheels

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = ROOT / "build" / "setup-stamp.json"
PROJECT = "contaccum-ext"
MODULE = ROOT / "contaccum_ext" / "_C.abi3.so"
MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)
PACKAGE_FILES = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "scripts" / "cuda_build.py"]
BUILD_TOOLS = ["setuptools>=77", "ninja"]

PROBE = """
import importlib.metadata as metadata, json, os, sys

def find(name):
    return next(iter(metadata.distributions(name=name)), None)

torch, project = find("torch"), find(sys.argv[1])
origin = json.loads(project.read_text("direct_url.json") or "{}") if project else {}
own = os.path.isdir(os.path.join(sys.prefix, "conda-meta")) or sys.prefix != sys.base_prefix
print(json.dumps({"torch": torch and torch.version, "own": own, "project": origin.get("url")}))
"""


@dataclass
class Interpreter:
    """A Python and what is in it."""

    path: str
    torch: str | None  # version
    project: str | None  # URL of the checkout that this project is installed from
    own: bool  # in a virtual or conda environment: packages may be put into it

    @classmethod
    def probe(cls, path: str) -> Interpreter:
        """Ask the Python at ``path`` about itself."""
        command = [path, "-c", PROBE, PROJECT]
        # Not run in the repository, where a leftover *.egg-info would look like a package.
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd="/")
        return cls(path=path, **json.loads(answer.stdout))

    @property
    def has_project(self) -> bool:
        """Whether this checkout is installed, and not another."""
        return self.project == ROOT.as_uri()

    @property
    def has_torch(self) -> bool:
        """Whether torch is there and new enough."""
        if self.torch is None:
            return False
        return tuple(int(part) for part in self.torch.split(".")[:2]) >= MIN_TORCH

    def pip(self, *arguments: str) -> None:
        """Run pip, with its output on stderr: stdout belongs to the command that follows."""
        command = [self.path, "-m", "pip", *arguments]
        # setuptools warns about every editable install; errors come through all the same.
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT, env=quiet)


def say(message: str) -> None:
    """Report progress."""
    print(f"setup: {message}", file=sys.stderr, flush=True)


def source_files() -> list[Path]:
    """Return everything the extension is compiled from."""
    return [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]


def digest(paths: list[Path]) -> str:
    """Return a hash of the names and contents of ``paths``."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.relative_to(ROOT)}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@dataclass
class Stamp:
    """What a finished set-up depended on."""

    python: str
    torch: str | None
    package: str
    sources: str
    extras: list[str]

    @classmethod
    def load(cls) -> Stamp | None:
        """Return the stamp of the last set-up that went through."""
        try:
            return cls(**json.loads(STAMP.read_text(encoding="utf-8")))
        except (FileNotFoundError, TypeError, ValueError):
            return None

    @classmethod
    def now(cls, target: Interpreter, extras: list[str]) -> Stamp:
        """Return the stamp of ``target`` and of the files as they are."""
        return cls(
            python=target.path,
            torch=target.torch,
            package=digest(PACKAGE_FILES),
            sources=digest(source_files()),
            extras=extras,
        )

    def fits(self, target: Interpreter) -> bool:
        """Whether ``target`` holds this set-up, up to changed sources and further extras."""
        now = Stamp.now(target, self.extras)
        same = (self.python, self.torch, self.package) == (now.python, now.torch, now.package)
        return same and target.has_project

    def save(self) -> None:
        """Remember this set-up."""
        STAMP.parent.mkdir(exist_ok=True)
        STAMP.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def make_venv(lend_packages: bool) -> None:
    """Create ``.venv``; with ``lend_packages`` it sees what the running Python has."""
    say(f"making {VENV.name} with Python {sys.version.split()[0]}")
    options = ["--system-site-packages"] if lend_packages else []
    command = [sys.executable, "-m", "venv", *options, str(VENV)]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        # A half-made directory would be taken for a working one next time.
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(
            "setup: the venv module did not work; on Debian and Ubuntu it comes with the "
            "package python3-venv"
        )


def choose_interpreter() -> Interpreter:
    """Return the Python to install into, as the module docstring lays down."""
    running = Interpreter.probe(sys.executable)
    if running.own and running.has_torch:
        return running
    python = VENV / "bin" / "python"
    if not python.exists():
        make_venv(lend_packages=running.has_torch)
    target = Interpreter.probe(str(python))
    if not target.own:
        # A .venv without its pyvenv.cfg is the system Python by another name.
        sys.exit(f"setup: {VENV} is damaged; delete it and run this again")
    return target


def ensure_tools_and_torch(target: Interpreter) -> Interpreter:
    """Install pip, the build tools and torch where they are missing."""
    if subprocess.run([target.path, "-m", "pip", "--version"], capture_output=True).returncode:
        subprocess.run([target.path, "-m", "ensurepip"], check=True, stdout=sys.stderr)
    if Path(target.path).is_relative_to(VENV):
        target.pip("install", "--quiet", "--upgrade", "pip")
    target.pip("install", "--quiet", *BUILD_TOOLS)
    if not target.has_torch:
        torch_wheels.install(target.path, say)
    return Interpreter.probe(target.path)


def install_package(target: Interpreter, extras: list[str], build: bool) -> None:
    """Install the project with ``extras``, editable; without ``build`` it is there already."""
    constraint = STAMP.with_name("torch-constraint.txt")
    constraint.parent.mkdir(exist_ok=True)
    # No extra may replace the torch that is there.
    constraint.write_text(f"torch=={target.torch}\n", encoding="utf-8")
    names = f"[{','.join(extras)}]" if extras else ""
    # Asked for by name, a project that is installed is not built again, only its extras come.
    what = ["--editable", f".{names}"] if build else [f"{PROJECT}{names}"]
    options = ["--quiet", "--no-build-isolation", "--constraint", str(constraint)]
    say(f"{'building and installing' if build else 'adding to'} {PROJECT}{names}")
    target.pip("install", *options, *what)


def rebuild_module(target: Interpreter) -> None:
    """Compile the sources that changed; the installed project uses the result as it is."""
    say("csrc has changed: rebuilding the extension")
    command = [target.path, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)


def set_up(extras: list[str]) -> Interpreter:
    """Bring the environment up to date and return its Python."""
    target = choose_interpreter()
    # ninja and the other tools of the environment are found by what runs below.
    programs = str(Path(target.path).parent)
    os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    done = Stamp.load()
    if done is None or not done.fits(target):
        target = ensure_tools_and_torch(target)
        install_package(target, extras, build=True)
        done = Stamp.now(target, extras)
    if done.sources != digest(source_files()) or not MODULE.exists():
        rebuild_module(target)
    missing = set(extras) - set(done.extras)
    if missing:
        install_package(target, sorted(missing), build=False)
    now = Stamp.now(target, sorted({*done.extras, *extras}))
    if now != Stamp.load():
        now.save()
    return target


def main() -> None:
    """Set up, then become the command."""
    if sys.version_info < MIN_PYTHON:
        sys.exit("setup: Python 3.10 or newer is needed; name one with PYTHON=... on make")
    parser = argparse.ArgumentParser(description="Set the project up, then run a command in it.")
    parser.add_argument("--extra", action="append", default=[], help="extra of pyproject.toml")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        set_up(sorted(set(options.extra)))
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup: this command failed: {' '.join(map(str, error.cmd))}")
    if options.command:
        os.execvp(options.command[0], options.command)


if __name__ == "__main__":
    main()
