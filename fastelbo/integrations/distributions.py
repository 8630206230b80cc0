"""torch.distributions: the KL of two Normals, for every library that calls `kl_divergence`, as scvi-tools and lightning-bolts do.

Examples:
    >>> import torch
    >>> from torch.distributions import Independent, Normal, kl_divergence
    >>> from fastelbo.integrations import distributions
    >>> q, p = Normal(torch.ones(4, 3), 1.0), Normal(torch.zeros(4, 3), 1.0)
    >>> with distributions.patch():
    ...     kl_divergence(q, p).sum(-1), kl_divergence(Independent(q, 1), Independent(p, 1))
    (tensor([1.5000, 1.5000, 1.5000, 1.5000]), tensor([1.5000, 1.5000, 1.5000, 1.5000]))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch.distributions import Normal, kl, register_kl

from ..latent import kl_divergence
from .patching import Patch


@contextmanager
def _registered() -> Iterator[None]:
    registry = getattr(kl, "_KL_REGISTRY", {})
    if (Normal, Normal) not in registry:
        raise ImportError("fastelbo knows no torch in which torch.distributions.kl has no registration for two Normals")
    before = registry[Normal, Normal]
    # Registering also clears what `kl_divergence` has remembered for subclasses.
    register_kl(Normal, Normal)(kl_divergence)
    try:
        yield
    finally:
        register_kl(Normal, Normal)(before)


_PATCH = Patch(_registered)


def patch() -> AbstractContextManager[object]:
    """Register the fused KL for two Normals, and for subclasses that have no registration of their own.

    `kl_divergence(q, p)` is of the shape that q and p broadcast to, as before, and that of two `Independent` sums it. It is in
    nats, differentiable in all four parameters, and in float32 where they are in half precision.

    Raises:
        ImportError: This torch keeps its registrations elsewhere.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Register what was registered before."""
    _PATCH.undo()
