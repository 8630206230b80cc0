"""pyro: KL and log-density of Normals in an ELBO.

Examples:
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from fastelbo.integrations import pyro as fused
    >>> def model(x):
    ...     with pyro.plate("batch", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
    >>> def guide(x):
    ...     loc = pyro.param("loc", torch.ones(2))
    ...     with pyro.plate("batch", len(x)):
    ...         pyro.sample("z", dist.Normal(loc.expand(len(x), 2), 1.0).to_event(1))
    >>> with fused.patch():
    ...     loss = pyro.infer.TraceMeanField_ELBO().loss(model, guide, torch.zeros(4, 2))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from ..functional import gaussian_nll
from ..latent import kl_divergence
from .patching import Patch, check_version, replaced

KNOWN = "1.9.2"


def _unexpanded(t: Tensor) -> Tensor:
    """One of the equal values along each expanded dimension: a Normal expands a number to the shape of its loc."""
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if size > 1 and stride == 0:
            t = t.narrow(dim, 0, 1)
    return t


def _log_prob(p: Normal, value: Tensor, event_dims: int) -> Tensor:
    """Log-density of the shape that p and the value broadcast to, summed over the last `event_dims` dimensions."""
    loc = p.loc
    if value.shape != loc.shape:
        loc, value = torch.broadcast_tensors(loc, value)
    return -gaussian_nll(loc, value, std=_unexpanded(p.scale), batch_dims=loc.ndim - event_dims)


@contextmanager
def _patched() -> Iterator[None]:
    check_version("pyro-ppl", KNOWN)
    import pyro.distributions as dist
    from pyro.infer import trace_mean_field_elbo

    # A subclass may have a density or a registration of its own, so these types are meant exactly.
    normals, independents = {Normal, dist.Normal}, {Independent, dist.Independent}
    pyro_kl, pyro_log_prob = trace_mean_field_elbo.kl_divergence, dist.Independent.log_prob

    def events_of(d: Any) -> int | None:
        """How many dimensions of a Normal are one event; None for any other distribution."""
        base, dims = (d.base_dist, d.reinterpreted_batch_ndims) if type(d) in independents else (d, 0)
        return dims if type(base) in normals and not torch._C._is_tracing() else None

    def kl(p: Any, q: Any) -> Any:
        dims = events_of(p)
        return pyro_kl(p, q) if dims is None or dims != events_of(q) else kl_divergence(p, q)

    def log_prob(self: Any, value: Any) -> Any:
        dims = events_of(self)
        if dims is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return pyro_log_prob(self, value)
        base = self.base_dist
        if base._validate_args:
            base._validate_sample(value)
        return _log_prob(base, value, dims)

    with replaced([(trace_mean_field_elbo, "kl_divergence", kl), (dist.Independent, "log_prob", log_prob)]):
        yield


_PATCH = Patch(_patched)


def patch() -> AbstractContextManager[object]:
    """Fuse the KL of two Normals in `TraceMeanField_ELBO`, and the log-density of `Normal(...).to_event(n)` everywhere.

    The KL also where both are events of the same number of dimensions. Other distributions, subclasses and traces of `torch.jit`
    go to pyro's own code. Values are in nats, and in float32 where the parameters are in half precision.

    Raises:
        ImportError: pyro-ppl is not installed, or in a version other than 1.9.2.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Restore pyro's own code."""
    _PATCH.undo()
