"""Builds ``contaccum_ext._C``, one abi3 module that serves every torch from 2.11 on.

Everything else about the package stands in pyproject.toml.  torch is deliberately not a
build requirement: pip would fetch a second one, on Linux with gigabytes of CUDA libraries.
The module is built against the torch that is installed; docs/stable-abi.md says why its
version does not matter afterwards.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "scripts"))  # a PEP 517 front end runs this file from elsewhere

import cuda_build  # noqa: E402

MIN_TORCH = (2, 11)
NO_TORCH = (
    "contaccum-ext needs torch {minimum} or newer to build, and {found}: "
    "install torch for this Python first, then run the build again with --no-build-isolation."
)


def see_interpreter_packages() -> None:
    """Append the interpreter's own import path, which an isolated build hides."""
    ask = "import json, sys; print(json.dumps(sys.path[1:]))"
    # -E drops the PYTHONPATH that pip's isolation sets, and with it the isolation.
    answer = subprocess.run(
        [sys.executable, "-E", "-c", ask], check=True, capture_output=True, text=True
    )
    sys.path += [entry for entry in json.loads(answer.stdout) if entry not in sys.path]


def import_cpp_extension():
    """Return ``torch.utils.cpp_extension`` of a torch that is new enough, or stop."""
    see_interpreter_packages()
    minimum = ".".join(map(str, MIN_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        found = f"{sys.executable} finds none"
        raise SystemExit(NO_TORCH.format(minimum=minimum, found=found)) from None
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        raise SystemExit(NO_TORCH.format(minimum=minimum, found=f"found torch {version}"))
    from torch.utils import cpp_extension

    return cpp_extension


def build_inputs() -> list[str]:
    """Return every file the build reads, so that a source distribution carries them too."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    files.append(Path(cuda_build.__file__))
    return sorted(str(path.relative_to(ROOT)) for path in files)


cpp_extension = import_cpp_extension()


class BuildWithKernels(cpp_extension.BuildExtension):
    """Compiles the kernels by plain nvcc and links them in: torch need not know CUDA."""

    def build_extensions(self) -> None:
        toolkit = cuda_build.cuda_toolkit()
        if toolkit is None:
            print("contaccum-ext: no nvcc found or wanted, building for the CPU alone")
        else:
            self.add_kernels(self.extensions[0], toolkit)
        super().build_extensions()

    def add_kernels(self, extension: Extension, toolkit: Path) -> None:
        extension.extra_objects = [str(path) for path in cuda_build.compile_kernels(toolkit)]
        extension.define_macros.append(("CONTACCUM_WITH_CUDA", "1"))
        extension.library_dirs.append(str(toolkit / "lib64"))
        # Static: nothing of CUDA has to be present where the module is loaded.
        extension.libraries += ["cudart_static", "rt", "pthread", "dl"]


extension = Extension(
    name="contaccum_ext._C",
    sources=cuda_build.read_sources("cpu"),
    depends=build_inputs(),
    include_dirs=["csrc", *cpp_extension.include_paths()],
    library_dirs=cpp_extension.library_paths(),
    # No torch_python: it is the one torch library tied to a Python version.
    libraries=["torch_cpu", "c10"],
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        # No -march and no -ffast-math: the kernels choose their instruction set at run
        # time and rely on infinities and NaNs; only errno is given up.
        "-fno-math-errno",
        # Error messages name the source file; not where it lay on the building machine.
        f"-ffile-prefix-map={ROOT}/=",
        # GCC's default, but -std=c++20 would turn fused multiply-add off.
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wno-psabi",
        # Many Pythons pass -g on to extensions; symbols would be most of the wheel.
        "-g0",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DPy_LIMITED_API=0x030A0000",
    ],
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildWithKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
