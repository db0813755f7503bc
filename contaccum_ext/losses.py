"""The loss as a module that owns its bank."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from contaccum_ext import validation
from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.functional import contaccum_loss

MAX_SCALE = 100.0  # as in CLIP


class LearnedTemperature(nn.Module):
    """A temperature as CLIP learns it: by the logarithm of the scale, which has a largest value.

    Equivalent to ``1 / min(exp(log_scale), max_scale)``, whose gradient does not vanish at the
    largest scale: in ``train()`` a call brings the parameter back to it.

    Args:
        temperature: positive number to begin with; at least ``1 / max_scale``.
        max_scale: 1 / the smallest temperature; 100 in CLIP.
        dtype: of the parameter, floating.
        device: where it lives.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: CLIP, arXiv 2103.00020, section 2.5.
    """

    def __init__(
        self,
        temperature: float,
        max_scale: float = MAX_SCALE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.max_scale = validation.positive("max_scale", max_scale)
        self.log_scale = nn.Parameter(torch.tensor(0.0, dtype=dtype, device=device))
        self.set(temperature)

    @torch.no_grad()
    def set(self, temperature: float) -> None:
        """Go on from another temperature, a number of at least ``1 / max_scale``."""
        scale = 1 / validation.positive("temperature", temperature)
        # Up to what rounding makes of 1 / (1 / max_scale).
        if scale > self.max_scale * (1 + 1e-12):
            raise ValueError(
                f"temperature: expected at least 1 / max_scale = {1 / self.max_scale:g}, "
                f"got {temperature}"
            )
        self.log_scale.fill_(math.log(scale))

    def forward(self) -> Tensor:
        """() the temperature, with its graph."""
        highest = math.log(self.max_scale)
        if self.training:
            # Not seen by autograd: the graph of an earlier call may hold the parameter, whose value
            # this changes only after an optimizer step.
            self.log_scale.data.clamp_(max=highest)
        return torch.exp(-self.log_scale.clamp(max=highest))

    @property
    def value(self) -> float:
        """The temperature (reads the device)."""
        return torch.exp(-self.log_scale.detach().clamp(max=math.log(self.max_scale))).item()

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        return f"{self.value:.4g}, max_scale={self.max_scale:g}"


class ContAccumLoss(nn.Module):
    """`contaccum_ext.contaccum_loss` with a `contaccum_ext.DualMemoryBank` inside.

    In ``train()`` each call uses the bank and enqueues its batch; in ``eval()`` it neither reads
    nor writes the bank and gives the in-batch loss.

    Args:
        capacity: slots C of the bank.
        dim: embedding size d.
        passages_per_query: m, the positive first, then hard negatives.
        temperature: positive number; scores are inner products divided by it.
        row_weighting: "local" weights every row 1/n; "all" 1/(n + F) as in the paper.
        dtype: what representations are rounded to: float32, float64, bfloat16 or float16.
        device: where the bank lives.
        drift: "none", or "mean": correct old representations by the shift of their mean.
        drift_decay: decay per micro-batch of the means; see `mean_decay`.
        anticipate: for updates of fewer than eight micro-batches; see `DualMemoryBank`.
        learn_temperature: begin with `temperature` and learn it, with the exact gradient of the
            whole loss: ``learned.log_scale`` is a parameter to be handed to the optimizer, without
            weight decay. Each call then waits for the device once.
        max_scale: what 1 / a learned temperature may not exceed.
        symmetric: mean of this loss and of that with positives as rows and queries as columns.
        center_over: batches of an optimizer update, over which passages' gradients are to sum to
            zero; None for the exact gradients of the loss. See `contaccum_loss`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for temperature
            (unless learned), row_weighting and center_over at the first call.

    Source: ContAccum, arXiv 2406.12356, equations 5-9.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        passages_per_query: int = 1,
        *,
        temperature: float = 1.0,
        row_weighting: str = "local",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        drift: str = "none",
        drift_decay: float = 0.9,
        anticipate: bool = False,
        learn_temperature: bool = False,
        max_scale: float = MAX_SCALE,
        symmetric: bool = False,
        center_over: int | None = None,
    ) -> None:
        super().__init__()
        self.center_over = center_over
        self.bank = DualMemoryBank(
            capacity,
            dim,
            passages_per_query,
            dtype,
            device,
            drift,
            drift_decay,
            anticipate=anticipate,
            learn_temperature=learn_temperature,
            symmetric=symmetric,
        )
        self.learned: LearnedTemperature | None = None
        if learn_temperature:
            kind = torch.float64 if dtype == torch.float64 else torch.float32
            self.learned = LearnedTemperature(temperature, max_scale, kind, device)
        self._temperature = temperature
        self.row_weighting = row_weighting

    @property
    def temperature(self) -> float:
        """What scores are divided by (a learned one is read from the device); may be set."""
        return self._temperature if self.learned is None else self.learned.value

    @temperature.setter
    def temperature(self, value: float) -> None:
        if self.learned is None:
            self._temperature = value
        else:
            self.learned.set(value)

    def forward(
        self, queries: Tensor, passages: Tensor, passage_ids: Tensor | None = None
    ) -> Tensor:
        """() loss of a batch, float32, or float64 for a float64 bank; see `contaccum_loss`.

        Args:
            queries: (n, d) floating.
            passages: (n, m, d) of the same dtype, positive first; (n, d) means m = 1.
            passage_ids: (n, m) int64, -1 for none; None leaves nothing out.
        """
        return contaccum_loss(
            queries,
            passages,
            self.bank if self.training else None,
            self._temperature if self.learned is None else self.learned(),
            passage_ids,
            self.row_weighting,
            symmetric=self.bank.mirror is not None,
            center_over=self.center_over,
        )

    def extra_repr(self) -> str:
        """Say what ``repr`` shows beside the bank."""
        options = f"temperature={self.temperature}, row_weighting={self.row_weighting!r}"
        options += "" if self.bank.mirror is None else ", symmetric=True"
        return options if self.center_over is None else f"{options}, center_over={self.center_over}"
