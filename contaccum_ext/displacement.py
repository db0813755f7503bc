"""Where an optimizer step has taken an encoder's vectors: a ridge regression on a few probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor


@dataclass(frozen=True)
class Displacement:
    """The affine map v -> v + shift + (v - centre) slope that takes probes from old to new.

    The slope has rank R: where there are few probes it is kept, and applied, as two factors.
    """

    centre: Tensor  # (d,)
    shift: Tensor  # (d,)
    slope: tuple[Tensor, ...]  # (d, R) and (R, d), or (d, d): their product
    error: Tensor  # (): how far off it is for a text that is no probe, in spreads of the new probes

    @classmethod
    def fit(cls, old: Tensor, new: Tensor, ridge: float) -> Displacement:
        """Fit the map to probes.

        With E = old less its mean, D = (new - old) less its mean and G = E E^T (R, R), the slope is
        E^T (G + ridge tr(G) / R)^-1 D: of all maps that explain the displacements about as well,
        the one that moves other directions least. Its error is that of leaving each probe out in
        turn, which takes no other fits: the root mean square of e_i / (1 - h_i), e the residuals
        and h the leverages.

        Args:
            old: (R, d) floating, texts before a step; or (..., R, d), each a fit of its own.
            new: likewise, the same texts after it.
            ridge: in units of the mean eigenvalue of G; larger trusts the probes less.
        """
        # float64: G is nearly singular, and TF32 would drown what is small in it.
        old, moved = old.double(), new.double() - old.double()
        centre, shift = old.mean(-2, keepdim=True), moved.mean(-2, keepdim=True)
        spread = old - centre
        gram = spread @ spread.mT
        count, d = old.shape[-2:]
        tiny = torch.finfo(torch.float32).tiny  # for probes that are all alike
        strength = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + tiny
        identity = torch.eye(count, dtype=gram.dtype, device=gram.device).expand_as(gram)
        factor, _ = torch.linalg.cholesky_ex(gram + strength * identity)
        # Split evenly: then no singular value of the first factor is above 1, and rounding harms
        # neither.
        sides = torch.cat([spread, moved - shift, identity], -1)
        solved = torch.linalg.solve_triangular(factor, sides, upper=False)
        onto, back, root = solved.split([d, d, count], -1)
        slope = (onto.mT, back) if 2 * count < d else (onto.mT @ back,)
        # 1 - h_i; the mean, too, is fitted. Two probes leave nothing to tell from.
        free = strength * root.square().sum(-2).unsqueeze(-1) - 1 / count
        left_out = strength * (root.mT @ back) / free.clamp(min=1e-9)
        size = new.double().var(-2, correction=0).sum(-1).sqrt() + tiny
        error = left_out.square().sum(-1).mean(-1).sqrt() / size
        return cls(centre.squeeze(-2), shift.squeeze(-2), slope, error)

    def each(self, change: Callable[[Tensor], Tensor]) -> Displacement:
        """With all that it holds changed."""
        slope = tuple(map(change, self.slope))
        return Displacement(change(self.centre), change(self.shift), slope, change(self.error))

    def __call__(self, vectors: Tensor) -> Tensor:
        """(..., d) moved, in float32 where the vectors are narrower."""
        x = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return self.turn(x - self.centre.to(x)) + (self.centre + self.shift).to(x)

    def turn(self, differences: Tensor) -> Tensor:
        """(..., d): what becomes of differences between vectors, in their dtype."""
        flat = differences.flatten(0, -2)
        *onto, last = (factor.to(flat) for factor in self.slope)
        turned = flat
        for factor in onto:
            turned = turned @ factor
        return torch.addmm(flat, turned, last).view_as(differences)


def fit_all(pairs: list[tuple[Tensor, Tensor]], ridge: float) -> list[Displacement]:
    """Of old and new probes each; in one go if these are as many, since each takes many kernels."""
    if len({old.shape for old, _ in pairs}) > 1:
        return [Displacement.fit(old, new, ridge) for old, new in pairs]
    old, new = (torch.stack([x.double() for x in side]) for side in zip(*pairs, strict=True))
    both = Displacement.fit(old, new, ridge)
    return [both.each(itemgetter(i)) for i in range(len(pairs))]
