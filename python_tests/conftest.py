"""Settings that every test file shares: no network, few threads, hypothesis profiles, devices."""

from __future__ import annotations

import ctypes
import os

# Before anything imports transformers: a test that would download fails at once instead.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

from contaccum_ext import _C  # type: ignore[attr-defined]

# A thread pool on tensors this small only waits for itself: 10 times slower on a busy machine.
# Tests of threading ask for more.
torch.set_num_threads(1)

# No deadline: the first call of a compiled kernel, or a busy neighbour, is no failure.
# `ci` draws the same examples every time; `thorough` draws new ones and many more.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=100)
settings.register_profile(
    "thorough",
    deadline=None,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _why_not(device: str) -> str | None:
    """The reason why tests cannot run on a device, or None."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("contaccum_ext::banked_loss_", "CUDA"):
        return "built without the CUDA kernel"
    return None


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request) -> str:
    """Where tensors live; session scope, because hypothesis re-uses it over many examples."""
    reason = _why_not(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def group_device(device) -> str:
    """Where each of two processes has its tensors: on the CPU, or on a GPU of its own."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("wants two GPUs")
    return device


FAMILIES = {"portable": 1, "tensor cores": 2, "library": 4}  # enum KernelFamily in csrc/cuda


def choose_kernels(*families: str) -> None:
    """Restrict the op to some families of CUDA kernels; portable ones serve where no other can.

    Without "portable" the products are left to torch's library however small they are.
    """
    ctypes.CDLL(_C.__file__).contaccum_allow_kernels(sum(FAMILIES[name] for name in families))


@pytest.fixture
def allow_kernels():
    """`choose_kernels` until the end of the test."""
    yield choose_kernels
    choose_kernels(*FAMILIES)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny encoder to train from."""
    # Here and not above: the op's tests do without transformers.
    from tiny_retriever import write_tiny_encoder

    return write_tiny_encoder(tmp_path_factory.mktemp("start") / "encoder")


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """The same with dropout and another layer."""
    from tiny_retriever import write_tiny_encoder

    return write_tiny_encoder(tmp_path_factory.mktemp("deep") / "encoder", dropout=0.1, layers=2)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Training runs in processes that can be killed."""
    from run_children import Runs

    return Runs(tmp_path_factory.mktemp("runs"))
