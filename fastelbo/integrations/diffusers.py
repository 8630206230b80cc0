"""diffusers: the posterior that AutoencoderKL, the video autoencoders and most others return.

Examples:
    >>> import torch
    >>> from diffusers import AutoencoderKL
    >>> from fastelbo.integrations import diffusers
    >>> vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    >>> with diffusers.patch():
    ...     posterior = vae.encode(torch.rand(2, 3, 8, 8)).latent_dist
    >>> z, kl = posterior.sample(), posterior.kl()
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor

from ..distributions import DiagonalGaussian
from .patching import Patch, check_version

KNOWN = "0.42.1"


def _summed_last(moments: Tensor) -> Tensor:
    """The dimensions 1, 2 and 3, over which `kl()` sums at every rank, as the last ones."""
    return moments if moments.ndim == 4 else moments.movedim((1, 2, 3), (-3, -2, -1))


def _loaded(parameters: Tensor, deterministic: bool) -> Any:
    """What a pickled posterior becomes: one of the class that is bound by then."""
    from diffusers.models.autoencoders import vae

    return vae.DiagonalGaussianDistribution(parameters, deterministic)


@functools.cache
def _fused(original: Any) -> Any:
    """The class that takes the place of the original, and is a subclass of it."""
    from diffusers.utils.torch_utils import randn_tensor

    # What the fused operations do not take goes to the original's methods, which read the properties.
    class DiagonalGaussianDistribution(original):
        def __init__(self, parameters: Tensor, deterministic: bool = False):
            self.parameters = parameters
            self.deterministic = deterministic
            self._posterior = DiagonalGaussian.from_moments(parameters, deterministic=deterministic)

        def __reduce__(self) -> tuple[Any, ...]:
            return _loaded, (self.parameters, self.deterministic)

        # Properties, because few callers want all four. They are not kept: one that was first read under no_grad has no gradient.
        mean = property(lambda self: self._posterior.mean)
        logvar = property(lambda self: self._posterior.logvar)
        std = property(lambda self: self._posterior.std)
        var = property(lambda self: self._posterior.var)

        def sample(self, generator: Any = None) -> Tensor:
            moments, shape = self.parameters, self.mean.shape
            noise = randn_tensor(shape, generator=generator, device=moments.device, dtype=moments.dtype)
            return self._posterior.rsample(eps=noise)

        def kl(self, other: Any = None) -> Tensor:
            given = [self] if other is None else [self, other]
            if any(not isinstance(d, original) or d.deterministic for d in given):
                return super().kl(other)
            moments = [d.parameters for d in given]
            ndim = moments[0].ndim
            if ndim < 4 or moments[0].shape != moments[-1].shape:
                return super().kl(other)
            q, *p = (DiagonalGaussian.from_moments(_summed_last(m), dim=-3) for m in moments)
            return q.kl(*p, batch_dims=ndim - 3)

        def nll(self, sample: Tensor, dims: Any = (1, 2, 3)) -> Tensor:
            if self.deterministic or not dims or sample.shape != self.mean.shape:
                return super().nll(sample, dims)
            return self._posterior.nll(sample, dims)

    return DiagonalGaussianDistribution


def _rebind(old: Any, new: Any) -> None:
    """Put one class in the place of another in every module that is imported; later ones import it from one of these."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for name in [name for name, value in list(vars(module).items()) if value is old]:
                vars(module)[name] = new


@contextmanager
def _patched() -> Iterator[None]:
    check_version("diffusers", KNOWN)
    from diffusers.models.autoencoders import vae

    original = vae.DiagonalGaussianDistribution
    fused = _fused(original)
    _rebind(original, fused)
    try:
        yield
    finally:
        _rebind(fused, original)


_PATCH = Patch(_patched)


def patch() -> AbstractContextManager[object]:
    """Put a fused subclass in the place of `DiagonalGaussianDistribution`, wherever a module has it by any name.

    It has the attributes and methods of the class it replaces, with the same noise for the same generator or seed. Like that
    class it sums `kl()` over the dimensions 1, 2 and 3 at every rank, so that the posterior of a video gives `(batch, width)`:
    `posterior.kl().sum() / batch` is the KL of a sample. KL and nll are in float32 where the moments are in half precision. A
    posterior keeps its class after `unpatch()`, and one that was made before `patch()` keeps its own.

    Raises:
        ImportError: diffusers is not installed, or in a version other than 0.42.1.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Put the original class back."""
    _PATCH.undo()
