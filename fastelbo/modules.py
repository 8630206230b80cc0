"""The functions as modules, for code that builds its losses once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import elbo_loss, gaussian_nll_loss, reparameterize


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
        if not isinstance(beta, (int, float, Tensor)):
            raise TypeError(f"beta must be a number or a 0-d tensor, got {type(beta).__name__}")
        self.beta = beta
        self.full, self.logvar_clamp, self.reduction = full, logvar_clamp, reduction
        self.return_terms, self.impl = return_terms, impl
        if learned:
            start = recon_logvar if isinstance(recon_logvar, Tensor) else torch.tensor(float(recon_logvar or 0.0))
            self.recon_logvar = nn.Parameter(start.detach().clone())
        elif isinstance(recon_logvar, Tensor):
            self.register_buffer("recon_logvar", recon_logvar)
        else:
            self.recon_logvar = recon_logvar

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
        held = "" if self.recon_logvar is None else f", recon_logvar={getattr(self.recon_logvar, 'shape', self.recon_logvar)}"
        return f"beta={self.beta}, reduction={self.reduction!r}{held}"
