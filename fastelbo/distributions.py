"""A diagonal Gaussian with the methods that latent-diffusion code expects of a posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import register_kl

from . import arguments, checks
from .dtypes import LOG_2PI, accumulate_dtype, plain
from .functional import gaussian_nll
from .latent import reparameterised
from .specs import Latent, LatentInputs
from .tracing import one_node
from .types import Clamp, Impl, Int, Reduction, Seed


def _sources(generator: Any, mu: Tensor) -> list[Generator]:
    """Check the argument `generator`; one generator for the whole batch, or one for each sample."""
    sources: list[Any] = generator if isinstance(generator, list) else [generator]
    for g in sources:
        if not isinstance(g, Generator):
            got = f"a list with {type(g).__name__}: a shape is a tuple" if isinstance(generator, list) else type(g).__name__
            raise TypeError(f"generator must be a torch.Generator or a list of them, one for each sample of the batch, got {got}")
        if g.device.type not in ("cpu", mu.device.type):
            raise ValueError(f"generator is on {g.device}, but mu is on {mu.device}: it must be there or on the CPU")
    if len(sources) != 1 and (not mu.ndim or len(sources) != mu.shape[0]):
        raise ValueError(
            f"generator is a list of {len(sources)}, but mu has shape {checks.shape_of(mu)}: give one for each sample of the batch"
        )
    return sources


def _noise(mu: Tensor, num_samples: int | None, eps: Tensor | None, seed: Seed | None, generator: Any) -> tuple[Any, Any]:
    """(eps, None) or (None, seed), as `arguments.noise`, except for what is drawn here.

    The classes that this one replaces fill a new, contiguous tensor. `randn_like` draws in the order of mu's memory, and so an
    element would get other noise where mu is channels-last.
    """
    if eps is not None or seed is not None or (generator is None and mu.is_cuda):
        return arguments.noise(mu, num_samples, eps, seed, generator)
    lead = () if num_samples is None else (num_samples,)
    if generator is None:
        return torch.randn((*lead, *mu.shape), dtype=mu.dtype, device=mu.device), None
    sources = _sources(generator, mu)
    shape = (*lead, *mu.shape) if len(sources) == 1 else (*lead, 1, *mu.shape[1:])
    drawn = [
        torch.randn(shape, generator=g, dtype=mu.dtype, device=mu.device if g.device.type != "cpu" else "cpu") for g in sources
    ]
    return (drawn[0] if len(drawn) == 1 else torch.cat(drawn, len(lead))).to(mu.device), None


def _summed(dims: Any, ndim: int) -> list[int]:
    """Check the argument `dims`; the dimensions in order, counted from 0."""
    given = [plain(d) for d in dims] if isinstance(dims, (list, tuple)) else [plain(dims)]
    if any(isinstance(d, bool) or not isinstance(d, int) for d in given):
        raise TypeError(f"dims must be ints, got {dims!r}")
    if not given:
        raise ValueError(f"dims must not be empty: batch_dims={ndim} keeps every element, and reduction='sum' keeps none")
    if any(not -ndim <= d < ndim for d in given) or len({d % ndim for d in given}) < len(given):
        raise ValueError(f"dims must be distinct and between {-ndim} and {ndim - 1}, got {dims!r}")
    return sorted(d % ndim for d in given)


@one_node
def of_posterior(
    q: tuple[Any, ...], prior: tuple[Any, Any], noise: tuple[Any, ...] | None, num_samples: int | None, kl: tuple[Any, ...] | None
) -> tuple[Any, Any]:
    """(z or None, kl or None).

    q: (mu, logvar, logvar_clamp, impl, moments, dim), moments being None or what mu and logvar are the halves of.
    noise: (eps, seed, generator or generators), or None for no sample.
    kl: (weight, reduction, batch_dims), or None for no KL.
    """
    mu, logvar, clamp, impl, moments, dim = q
    weight, reduction, batch_dims = kl or (None, "none", 0)
    inputs = arguments.posterior(mu, logvar, prior[0], ("other", prior[1]), weight)
    spec = Latent(arguments.kl_of(inputs, reduction, batch_dims, clamp), kl is not None, num_samples)
    if noise is not None:
        inputs = LatentInputs(*inputs[:5], *_noise(mu, num_samples, *noise))
    return reparameterised(inputs, spec, impl, None if moments is None else (moments, dim))


class DiagonalGaussian:
    """N(mu, diag(exp(logvar))) over all but the batch dimension.

    It has the methods of the `DiagonalGaussianDistribution` of latent-diffusion code (`sample`, `kl`, `nll`, `mode`), which
    `from_moments` builds as that class is built, and those of `torch.distributions.Independent(Normal(mu, std), mu.ndim - 1)`
    (`rsample`, `log_prob`, `entropy`, `torch.distributions.kl_divergence`). Every number is in nats, in float32 (float64 if mu or
    logvar is).

    Args:
        mu: Means, `(batch, ...)` of any rank.
        logvar: Log-variances, of mu's shape.
        logvar_clamp: (lo, hi) to clamp logvar to, with zero gradient outside.
        deterministic: Whether it stands for its mean, as in latent-diffusion code: std and var are 0, every sample is the mean, and
            kl, nll, log_prob and entropy are 0, of the shape that they would have, without gradient. logvar stays.
        impl: None or "auto", "triton", "torch", "reference", for every method.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        logvar_clamp: Clamp | None = None,
        deterministic: bool = False,
        impl: Impl | None = None,
    ):
        checks.pair("mu", mu, "logvar", logvar)
        self.mu = mu
        self.deterministic = bool(deterministic)
        self._logvar = logvar
        self._clamp = None if logvar_clamp is None else checks.clamp(logvar_clamp)
        self._impl = impl
        self._moments: tuple[Tensor, int] | None = None

    @classmethod
    def from_moments(
        cls,
        moments: Tensor,
        dim: int = 1,
        logvar_clamp: Clamp | None = (-30.0, 20.0),
        *,
        deterministic: bool = False,
        impl: Impl | None = None,
    ) -> DiagonalGaussian:
        """From an encoder's packed output: mu and logvar are its halves along `dim`, read where they lie, with one packed gradient.

        Raises:
            TypeError, ValueError: `moments` is not a floating tensor, or its size along `dim` is odd.
        """
        checks.tensor("moments", moments)
        if isinstance(dim, bool):
            raise TypeError(f"dim must be an int, got bool: write deterministic={dim}")
        if not isinstance(dim, int):
            raise TypeError(f"dim must be an int, got {type(dim).__name__}")
        if not -moments.ndim <= dim < moments.ndim:
            raise ValueError(f"dim must be between {-moments.ndim} and {moments.ndim - 1}, got {dim}")
        if moments.shape[dim] % 2:
            raise ValueError(f"moments must have an even size along dim {dim}, got shape {tuple(moments.shape)}")
        self = cls(*moments.chunk(2, dim), logvar_clamp=logvar_clamp, deterministic=deterministic, impl=impl)
        self._moments = moments, dim % moments.ndim
        return self

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}, "
            f"dtype={self.mu.dtype}, device={self.mu.device}, logvar_clamp={self._clamp}"
            f"{', deterministic=True' if self.deterministic else ''})"
        )

    @property
    def parameters(self) -> Tensor:
        """The moments that it was made from; of mu and logvar, before any clamp, both along dimension 1."""
        if self._moments is not None:
            return self._moments[0]
        return torch.cat((self.mu, self._logvar), min(1, self.mu.ndim - 1))

    @property
    def batch_shape(self) -> torch.Size:
        """The first dimension of mu."""
        return self.mu.shape[:1]

    @property
    def event_shape(self) -> torch.Size:
        """All dimensions of mu except for the first."""
        return self.mu.shape[1:]

    @property
    def logvar(self) -> Tensor:
        """Log-variances, clamped if the distribution clamps them."""
        return self._logvar if self._clamp is None else torch.clamp(self._logvar, *self._clamp)

    @property
    def std(self) -> Tensor:
        """Standard deviations, exp(logvar / 2)."""
        return torch.zeros_like(self._logvar) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variances, exp(logvar)."""
        return torch.zeros_like(self._logvar) if self.deterministic else torch.exp(self.logvar)

    @property
    def stddev(self) -> Tensor:
        """std, under the name that torch.distributions has for it."""
        return self.std

    @property
    def variance(self) -> Tensor:
        """var, under the name that torch.distributions has for it."""
        return self.var

    @property
    def mean(self) -> Tensor:
        """mu."""
        return self.mu

    def mode(self) -> Tensor:
        """mu, where the density is highest."""
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
        if other is not None and other.deterministic:
            raise ValueError("other is deterministic, so that the KL to it is infinite: make it without deterministic=True")
        q = self.mu, self._logvar, self._clamp, self._impl, *(self._moments or (None, 0))
        z, value = of_posterior(q, (None, None) if other is None else (other.mu, other.logvar), noise, num_samples, kl)
        return z, torch.zeros_like(value) if self.deterministic and kl is not None else value

    def _sampled(
        self,
        num_samples: Any,
        noise: tuple[Any, Any, Any],
        other: DiagonalGaussian | None = None,
        kl: tuple[Any, ...] | None = None,
    ) -> tuple[Any, Any]:
        eps, seed, generator = noise
        num_samples = plain(num_samples)
        sizes = num_samples if isinstance(num_samples, tuple) else () if num_samples is None else (num_samples,)
        for size in sizes:
            checks.samples(size)
        if self.deterministic or len(sizes) > 1:
            checks.noise(eps, seed, generator, (*sizes, *self.mu.shape), self.mu.device)
        if self.deterministic:
            # A copy, as every sample is: who writes into it does not mean the moments.
            return self.mu.expand(*sizes, *self.mu.shape).clone(), None if kl is None else self._of(other, kl=kl)[1]
        if len(sizes) > 1 and eps is not None:
            eps = eps.flatten(0, len(sizes) - 1)
        z, value = self._of(other, (eps, seed, generator), math.prod(sizes) if sizes else None, kl)
        return z.unflatten(0, sizes) if len(sizes) > 1 else z, value

    def rsample(
        self,
        num_samples: Int | tuple[int, ...] | Generator | list[Generator] | None = None,
        *,
        eps: Tensor | None = None,
        seed: Seed | None = None,
        generator: Generator | list[Generator] | None = None,
    ) -> Tensor:
        """A sample z = mu + exp(logvar / 2) * eps in mu's dtype, differentiable in mu and logvar.

        Args:
            num_samples: None or () for one sample of mu's shape; L or (L,) for samples of shape `(L, *mu.shape)`, and so on, as
                torch.distributions has it. A generator or a list of them in this place is `generator`, as in diffusers.
            eps: The noise itself, of z's shape; a constant.
            seed: An int or a 0-d int64 tensor on mu's device, as in `fastelbo.reparameterize`.
            generator: What `torch.randn(mu.shape, generator=generator)` draws is the noise, whatever the memory layout of mu. A
                generator of the CPU draws there for a GPU too, so that one seed gives the same sample on both, and z is made from
                noise in memory. A list has one generator for each sample of the batch, or one for all. At most one of eps, seed and
                generator may be given. With none, the CPU draws `torch.randn(mu.shape)`, and a GPU draws a seed.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two sources of noise are given.
        """
        if isinstance(num_samples, (Generator, list)):
            if generator is not None:
                raise TypeError("generator is given twice: by position and by name")
            num_samples, generator = None, num_samples
        return self._sampled(num_samples, (eps, seed, generator))[0]

    def sample(
        self,
        num_samples: Int | tuple[int, ...] | Generator | list[Generator] | None = None,
        *,
        eps: Tensor | None = None,
        seed: Seed | None = None,
        generator: Generator | list[Generator] | None = None,
    ) -> Tensor:
        """As `rsample`: in latent-diffusion code, whose name this is, samples carry gradients."""
        return self.rsample(num_samples, eps=eps, seed=seed, generator=generator)

    def rsample_kl(
        self,
        other: DiagonalGaussian | None = None,
        *,
        num_samples: Int | tuple[int, ...] | None = None,
        eps: Tensor | None = None,
        seed: Seed | None = None,
        generator: Generator | list[Generator] | None = None,
        weight: Tensor | None = None,
        reduction: Reduction = "none",
        batch_dims: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """A sample, as `rsample`, and the KL to `other` (or N(0, I)), as `kl`, in one pass."""
        return self._sampled(num_samples, (eps, seed, generator), other, (weight, reduction, batch_dims))

    def kl(
        self,
        other: DiagonalGaussian | None = None,
        *,
        weight: Tensor | None = None,
        reduction: Reduction = "none",
        batch_dims: int = 1,
    ) -> Tensor:
        """KL to `other` (or N(0, I)) in nats, as `fastelbo.gaussian_kl`: `(batch,)` by default, at any rank.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or `other` is deterministic.
        """
        return self._of(other, kl=(weight, reduction, batch_dims))[1]

    def nll(
        self,
        x: Tensor,
        dims: int | Sequence[int] | None = None,
        *,
        full: bool = True,
        weight: Tensor | None = None,
        reduction: Reduction = "none",
        batch_dims: int = 1,
    ) -> Tensor:
        """-log density of x in nats, as `fastelbo.gaussian_nll`, differentiable in x, mu and logvar.

        Args:
            x: `(batch, ...)`, or samples of it, `(L, batch, ...)` with any number of leading dimensions, which the result keeps:
                `(L, batch)` by default. A mean over the batch is one over the samples too.
            dims: The dimensions of mu to sum over, in place of all but the first `batch_dims`.
            full: Include the constant (1/2) log 2 pi per element, so that the value is the density's.
            weight, reduction, batch_dims: As in `fastelbo.gaussian_nll`.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or dims are given with a reduction.
        """
        mu = self.mu
        checks.tensor("x", x, mu.device)
        samples = x.ndim - mu.ndim
        if samples < 0 or x.shape[samples:] != mu.shape:
            raise ValueError(
                f"x has shape {checks.shape_of(x)}, but mu has shape {checks.shape_of(mu)}: x must have it, "
                f"after any dimensions of samples: x.expand({checks.shape_of(mu)}) broadcasts"
            )
        checks.kept_dims(reduction, batch_dims, mu.ndim)
        rest: list[int] = []
        if dims is not None:
            if reduction != "none" or batch_dims != 1:
                raise ValueError("give dims, or a reduction or batch_dims: dims says already what is summed")
            summed = _summed(dims, mu.ndim)
            # One pass sums over the last dimensions; over others, it is a sum of its elements.
            is_last = summed == list(range(summed[0], mu.ndim))
            batch_dims, rest = (summed[0], []) if is_last else (mu.ndim, [d + samples for d in summed])
        nll = gaussian_nll(
            arguments.against_priors((mu,), x)[0] if samples else mu,
            x,
            logvar=self.logvar,
            full=full,
            weight=weight,
            reduction=reduction,
            batch_dims=batch_dims + samples,
            impl=self._impl,
        )
        if rest:
            nll = nll.sum(rest)
        return torch.zeros_like(nll) if self.deterministic else nll

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of x in nats, `(batch,)`, or `(L, batch)` of samples: -nll(x)."""
        return -self.nll(x)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, `(batch,)`, differentiable in logvar: the expectation of `nll`."""
        within = tuple(range(1, self.mu.ndim))
        logvar = self.logvar.to(accumulate_dtype(self.mu, self._logvar))
        # torch sums over everything where it is told no dimension.
        total = logvar.sum(within) if within else logvar
        entropy = 0.5 * total + 0.5 * (1 + LOG_2PI) * math.prod(self.event_shape)
        return torch.zeros_like(entropy) if self.deterministic else entropy


@register_kl(DiagonalGaussian, DiagonalGaussian)
def _kl_divergence(p: DiagonalGaussian, q: DiagonalGaussian) -> Tensor:
    """What `torch.distributions.kl_divergence` calls."""
    return p.kl(q)
