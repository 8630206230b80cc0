"""A diagonal Gaussian with the methods that latent-diffusion code expects of a posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, checks
from .functional import gaussian_nll, kl_of, posterior, reparameterised
from .specs import Latent, LatentInputs
from .tracing import one_node


@one_node
def of_posterior(
    q: tuple[Any, ...], prior: tuple[Any, Any], noise: tuple[Any, ...] | None, num_samples: int | None, kl: tuple[Any, ...] | None
) -> tuple[Any, Any]:
    """(z or None, kl or None).

    q: (mu, logvar, logvar_clamp, impl, moments, dim), moments being None or what mu and logvar are the halves of.
    noise: (eps, seed, generator), or None for no sample.
    kl: (weight, reduction, batch_dims), or None for no KL.
    """
    mu, logvar, clamp, impl, moments, dim = q
    weight, reduction, batch_dims = kl or (None, "none", 0)
    inputs = posterior(mu, logvar, *prior, weight)
    spec = Latent(kl_of(inputs, reduction, batch_dims, clamp), kl is not None, num_samples)
    if noise is not None:
        inputs = LatentInputs(*inputs[:5], *arguments.noise(mu, num_samples, *noise))
    return reparameterised(inputs, spec, impl, None if moments is None else (moments, dim))


class DiagonalGaussian:
    """N(mu, diag(exp(logvar))) over all but the batch dimension.

    Args:
        mu: Means, `(batch, ...)` of any rank.
        logvar: Log-variances, of mu's shape.
        logvar_clamp: (lo, hi) to clamp logvar to, with zero gradient outside.
        impl: None or "auto", "triton", "torch", "reference", for every method.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """

    def __init__(self, mu: Tensor, logvar: Tensor, *, logvar_clamp: tuple[float, float] | None = None, impl: str | None = None):
        checks.pair("mu", mu, "logvar", logvar)
        self.mu = mu
        self._logvar = logvar
        self._clamp = None if logvar_clamp is None else checks.clamp(logvar_clamp)
        self._impl = impl
        self._moments: tuple[Tensor, int] | None = None

    @classmethod
    def from_moments(
        cls, moments: Tensor, dim: int = 1, logvar_clamp: tuple[float, float] | None = (-30.0, 20.0), *, impl: str | None = None
    ) -> DiagonalGaussian:
        """From an encoder's packed output: mu and logvar are its halves along `dim`, read where they lie, with one packed gradient.

        Raises:
            TypeError, ValueError: `moments` is not a floating tensor, or its size along `dim` is odd.
        """
        checks.tensor("moments", moments)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim must be an int, got {type(dim).__name__}")
        if not -moments.ndim <= dim < moments.ndim:
            raise ValueError(f"dim must be between {-moments.ndim} and {moments.ndim - 1}, got {dim}")
        if moments.shape[dim] % 2:
            raise ValueError(f"moments must have an even size along dim {dim}, got shape {tuple(moments.shape)}")
        self = cls(*moments.chunk(2, dim), logvar_clamp=logvar_clamp, impl=impl)
        self._moments = moments, dim % moments.ndim
        return self

    @property
    def logvar(self) -> Tensor:
        return self._logvar if self._clamp is None else torch.clamp(self._logvar, *self._clamp)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    @property
    def mean(self) -> Tensor:
        return self.mu

    def mode(self) -> Tensor:
        return self.mu

    def _of(
        self,
        other: DiagonalGaussian | None,
        noise: tuple[Any, ...] | None = None,
        num_samples: int | None = None,
        kl: tuple[Any, ...] | None = None,
    ) -> tuple[Any, Any]:
        if other is not None and not isinstance(other, DiagonalGaussian):
            raise TypeError(f"other must be a DiagonalGaussian or None, got {type(other).__name__}")
        q = self.mu, self._logvar, self._clamp, self._impl, *(self._moments or (None, 0))
        return of_posterior(q, (None, None) if other is None else (other.mu, other.logvar), noise, num_samples, kl)

    def rsample(
        self,
        num_samples: int | None = None,
        *,
        eps: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A differentiable sample, as `fastelbo.reparameterize`."""
        return self._of(None, (eps, seed, generator), num_samples)[0]

    def sample(
        self,
        num_samples: int | None = None,
        *,
        eps: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `rsample`: in latent-diffusion code, whose name this is, samples carry gradients."""
        return self.rsample(num_samples, eps=eps, seed=seed, generator=generator)

    def rsample_kl(
        self,
        other: DiagonalGaussian | None = None,
        *,
        num_samples: int | None = None,
        eps: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        reduction: str = "none",
        batch_dims: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """A sample and the KL to `other` (or N(0, I)) in one pass, as `fastelbo.reparameterize_kl`."""
        return self._of(other, (eps, seed, generator), num_samples, (weight, reduction, batch_dims))

    def kl(
        self,
        other: DiagonalGaussian | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "none",
        batch_dims: int = 1,
    ) -> Tensor:
        """KL to `other` (or N(0, I)) in nats, as `fastelbo.gaussian_kl`: `(batch,)` by default, at any rank."""
        return self._of(other, kl=(weight, reduction, batch_dims))[1]

    def nll(
        self, x: Tensor, *, full: bool = True, weight: Tensor | None = None, reduction: str = "none", batch_dims: int = 1
    ) -> Tensor:
        """-log density of x in nats, as `fastelbo.gaussian_nll`."""
        return gaussian_nll(
            self.mu, x, logvar=self.logvar, full=full, weight=weight, reduction=reduction, batch_dims=batch_dims, impl=self._impl
        )
