#!/usr/bin/env python3
"""Steps over small banks that take every CUDA kernel once, for compute-sanitizer.

    compute-sanitizer --tool memcheck python scripts/sanitize.py

Likewise racecheck, synccheck and initcheck; for the last, PYTORCH_NO_CUDA_MEMORY_CACHING=1 lets it
see where an allocation ends. The values are the tests' business, here they only must be finite.
"""

from __future__ import annotations

import torch

import contaccum_ext as ca

# capacity, d, m, n, dtype, drift, steps, with ids; what they are to reach
HISTORIES = (
    (1024, 128, 1, 70, torch.bfloat16, "mean", 17, True),  # one Hopper block a vector, wrap-around
    (1024, 768, 2, 40, torch.float16, "mean", 4, True),  # two blocks a vector
    (1024, 1024, 1, 64, torch.bfloat16, "none", 3, False),
    (4096, 384, 1, 128, torch.bfloat16, "none", 4, True),
    (2048, 768, 2, 8, torch.bfloat16, "mean", 3, True),  # mma.sync
    (100, 48, 1, 8, torch.float32, "mean", 14, True),  # portable, wrap-around
    (2048, 512, 1, 128, torch.float32, "mean", 17, True),  # products by torch, wrap-around
    (2050, 1100, 1, 128, torch.float16, "mean", 17, True),  # the same with a short last block
    (60, 33, 2, 5, torch.float64, "none", 14, True),
    (20, 16, 2, 30, torch.float32, "mean", 2, True),  # a batch larger than the bank
)


def run(capacity, d, m, n, dtype, drift, steps, with_ids, keeps_more) -> None:
    """A few training steps from an empty bank, or from one with a second table and a mirror."""
    kinds = {"learn_temperature": keeps_more, "symmetric": keeps_more}
    bank = ca.DualMemoryBank(capacity, d, m, dtype, "cuda", drift, **kinds)
    for seed in range(steps):
        generator = torch.Generator("cuda").manual_seed(seed)
        shape, device = (n, 1 + m, d), torch.device("cuda")
        vectors = torch.randn(shape, device=device, generator=generator)
        vectors = torch.nn.functional.normalize(vectors, dim=-1).to(dtype)
        ids = torch.randint(-1, 50, (n, m), device=device, generator=generator)
        queries = vectors[:, 0].contiguous().requires_grad_()
        passages = vectors[:, 1:].contiguous().requires_grad_()
        tau = torch.tensor(0.1, device=device, requires_grad=True) if keeps_more else 0.1
        given = ids if with_ids else None
        loss = ca.contaccum_loss(queries, passages, bank, tau, given, symmetric=keeps_more)
        loss.backward()
        if not torch.isfinite(loss):
            raise SystemExit(f"loss {loss.item()} with capacity {capacity}, d {d}, n {n}, {dtype}")


def main() -> None:
    """All histories, and a loss without a bank."""
    for history in HISTORIES:
        for keeps_more in (False, True):
            run(*history, keeps_more)
    queries = torch.randn(80, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ca.contaccum_loss(queries, queries.detach(), None, 20.0).backward()
    torch.cuda.synchronize()
    print(f"{2 * len(HISTORIES)} histories, all finite")


if __name__ == "__main__":
    main()
