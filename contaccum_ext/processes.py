"""Several processes: each has banks of its own, which DistributedDataParallel must not replace."""

from __future__ import annotations

import gc
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Module = TypeVar("Module", bound=nn.Module)


def several_processes() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def keep_banks_from_ddp(module: Module) -> Module:
    """Let every process keep the banks in a module that DistributedDataParallel is about to wrap.

    It copies the first process's buffers over the others' when it wraps a module, and again at
    every forward: by default banks too. They are put on the list of what it leaves alone::

        model = DistributedDataParallel(keep_banks_from_ddp(model))

    Not needed where banks are outside of the wrapped module.

    Args:
        module: with banks anywhere inside; not wrapped yet. Those that are added later are not on
            the list.

    Returns:
        The same module.

    Raises:
        TypeError, ValueError: it is wrapped already, or has no banks.
    """
    from contaccum_ext.bank import DualMemoryBank

    if isinstance(module, DistributedDataParallel):
        raise TypeError("module: expected one to be wrapped, got a DistributedDataParallel")
    names = {
        f"{place}.{name}".lstrip(".")
        for place, part in module.named_modules()
        if isinstance(part, DualMemoryBank)
        for name, _ in part.named_buffers(recurse=False)
    }
    if not names:
        raise ValueError(f"module: expected one with banks inside, got {type(module).__name__}")
    names |= set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(names))
    return module


def refuse_broadcast(buffer: Tensor) -> None:
    """Refuse a buffer of a bank that a wrapper in this process is going to replace.

    A bank does not know the modules around it, and the wrapper need not be running when the bank is
    used. So all objects are looked through, which takes about a tenth of a second.

    Args:
        buffer: (any shape) of the bank.

    Raises:
        RuntimeError: there is such a wrapper.
    """
    name = _broadcast_as(buffer)
    if name is not None:
        gc.collect()  # a wrapper that was thrown away may still be there, in a reference cycle
        name = _broadcast_as(buffer)
    if name is not None:
        raise RuntimeError(
            f"bank: expected one that each process keeps for itself, got {name} of a "
            f"DistributedDataParallel module, which replaces it by the first process's at "
            f"every forward; wrap contaccum_ext.keep_banks_from_ddp(module) instead, or "
            f"leave the bank out of the module"
        )


def _broadcast_as(buffer: Tensor) -> str | None:
    """The name by which a wrapper replaces a buffer; None if none does."""
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    for wrapper in wrappers:
        # One whose making has failed does not have it, and replaces nothing.
        if not getattr(wrapper, "broadcast_buffers", False):
            continue
        if dist.get_world_size(wrapper.process_group) == 1:
            continue
        for name, found in wrapper.module.named_buffers():
            if found is buffer and name not in wrapper.parameters_to_ignore:
                return name
    return None
