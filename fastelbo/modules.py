"""The functions as modules, for code that builds its losses once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import elbo_loss, gaussian_nll_loss, reparameterize
from .linear import linear_elbo_loss


def _check_beta(beta: float | Tensor) -> float | Tensor:
    if not isinstance(beta, (int, float, Tensor)):
        raise TypeError(f"beta must be a number or a 0-d tensor, got {type(beta).__name__}")
    return beta


def _hold_logvar(module: nn.Module, recon_logvar: Tensor | float | None, learned: bool, **factory: Any) -> None:
    """Make recon_logvar a parameter (None starts at 0), a buffer or a plain attribute of the module."""
    if learned:
        start = recon_logvar if isinstance(recon_logvar, Tensor) else torch.tensor(float(recon_logvar or 0.0), **factory)
        module.recon_logvar = nn.Parameter(start.detach().clone())
    elif isinstance(recon_logvar, Tensor):
        module.register_buffer("recon_logvar", recon_logvar)
    else:
        module.recon_logvar = recon_logvar  # type: ignore[assignment]


def _shown(recon_logvar: Tensor | float | None) -> str:
    return "" if recon_logvar is None else f", recon_logvar={getattr(recon_logvar, 'shape', recon_logvar)}"


class GaussianNLLLoss(nn.Module):
    """Drop-in for `torch.nn.GaussianNLLLoss`; see `fastelbo.gaussian_nll_loss`."""

    def __init__(self, *, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> None:
        super().__init__()
        self.full, self.eps, self.reduction = full, eps, reduction

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"full={self.full}, eps={self.eps}, reduction={self.reduction!r}"


class Reparameterize(nn.Module):
    """Samples z ~ N(mu, exp(logvar)); in eval mode returns mu, the mode, as most VAE code does. See `fastelbo.reparameterize`."""

    def __init__(self, num_samples: int | None = None, *, impl: str | None = None) -> None:
        super().__init__()
        self.num_samples, self.impl = num_samples, impl

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        eps: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if not self.training:
            return mu if self.num_samples is None else mu.expand(self.num_samples, *mu.shape)
        return reparameterize(mu, logvar, self.num_samples, eps=eps, seed=seed, generator=generator, impl=self.impl)

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}"


class ELBOLoss(nn.Module):
    """`fastelbo.elbo_loss` that holds beta, the reduction and the likelihood's log-variance.

    Args:
        beta: Weight of the KL, a number. `loss.beta = ...` schedules it without recompiling anything.
        recon_logvar: None (unit variance), a number, or a tensor that broadcasts to recon.
        learned: Make recon_logvar a parameter; None then starts at 0.
        full, logvar_clamp, reduction, return_terms, impl: As in `fastelbo.elbo_loss`.
    """

    recon_logvar: Tensor | float | None

    def __init__(
        self,
        *,
        beta: float = 1.0,
        recon_logvar: Tensor | float | None = None,
        learned: bool = False,
        full: bool = True,
        logvar_clamp: tuple[float, float] | None = None,
        reduction: str = "batchmean",
        return_terms: bool = False,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.beta = _check_beta(beta)
        self.full, self.logvar_clamp, self.reduction = full, logvar_clamp, reduction
        self.return_terms, self.impl = return_terms, impl
        _hold_logvar(self, recon_logvar, learned)

    def forward(
        self,
        recon: Tensor,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        *,
        recon_logvar: Tensor | float | None = None,
        prior_mu: Tensor | float | None = None,
        prior_logvar: Tensor | float | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss; a decoder's own `recon_logvar` takes the place of the module's, which must then be None."""
        if recon_logvar is not None and self.recon_logvar is not None:
            raise ValueError("recon_logvar is given, but this ELBOLoss holds one: build it with recon_logvar=None")
        return elbo_loss(
            recon, x, mu, logvar, recon_logvar=self.recon_logvar if recon_logvar is None else recon_logvar, prior_mu=prior_mu,
            prior_logvar=prior_logvar, beta=self.beta, full=self.full, logvar_clamp=self.logvar_clamp, weight=weight,
            reduction=self.reduction, return_terms=self.return_terms, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"beta={self.beta}, reduction={self.reduction!r}{_shown(self.recon_logvar)}"


class LinearELBO(nn.Linear):
    """A linear decoder and its loss in one: `fastelbo.linear_elbo_loss` that holds weight, bias and what `ELBOLoss` holds.

    A `torch.nn.Linear(latents, elements)` in its parameters, their initialisation and its state_dict.

    Args:
        latents, elements: Sizes of z and of x, per sample.
        bias: Whether the layer has one.
        num_samples, precision: As in `fastelbo.linear_elbo_loss`.
        beta, recon_logvar, learned, full, reduction, return_terms, impl: As in `ELBOLoss`.
    """

    recon_logvar: Tensor | float | None

    def __init__(
        self,
        latents: int,
        elements: int,
        bias: bool = True,
        *,
        beta: float = 1.0,
        recon_logvar: Tensor | float | None = None,
        learned: bool = False,
        num_samples: int | None = None,
        full: bool = True,
        reduction: str = "batchmean",
        return_terms: bool = False,
        precision: str | None = None,
        impl: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(latents, elements, bias, device, dtype)
        self.beta = _check_beta(beta)
        self.num_samples, self.full, self.reduction = num_samples, full, reduction
        self.return_terms, self.precision, self.impl = return_terms, precision, impl
        _hold_logvar(self, recon_logvar, learned, device=device, dtype=dtype)

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction of z `(..., latents)`, for what is not the loss: `(..., elements)`."""
        return F.linear(z, self.weight, self.bias)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        *,
        prior_mu: Tensor | float | None = None,
        prior_logvar: Tensor | float | None = None,
        eps: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of x `(batch, elements)` under the posterior N(mu, exp(logvar)), `(batch, latents)`."""
        return linear_elbo_loss(
            x, mu, logvar, self.weight, self.bias, recon_logvar=self.recon_logvar, prior_mu=prior_mu, prior_logvar=prior_logvar,
            beta=self.beta, num_samples=self.num_samples, eps=eps, seed=seed, generator=generator, full=self.full,
            reduction=self.reduction, return_terms=self.return_terms, precision=self.precision, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}, reduction={self.reduction!r}{_shown(self.recon_logvar)}"
