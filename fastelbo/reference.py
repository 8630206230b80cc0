"""The equations, line by line, in differentiable PyTorch: the oracle of every test.

Nothing here is fast or fused. Run in float64 it is the truth that the backends are held to; in the caller's dtype it is
`impl="reference"`, and it is what double backward (`create_graph=True`) differentiates, where an expression that autograd
can take apart again is worth more than speed. Half precision is widened before any arithmetic.

Source: [KW14] Kingma & Welling 2014, "Auto-Encoding Variational Bayes": equation 10, section 2.4, appendices B and C.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + sigma * eps, eps ~ N(0, I) ([KW14] section 2.4)."""
    return mu + torch.exp(0.5 * logvar) * eps


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mean, exp(logvar)) per element, in nats ([KW14] appendix C.2).

    The log-determinant of a diagonal covariance is the sum of the *log* variances, hence `logvar` and not `exp(logvar)`.
    """
    return -0.5 * (LOG_2PI + logvar + (x - mean) ** 2 * torch.exp(-logvar))


def gaussian_kl(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))) per element, in nats ([KW14] appendix B is the N(0, 1) case).

    With v = logvar - prior_logvar: 1/2 [ (mu - prior_mu)^2 / prior_var + (e^v - 1) - v ].
    """
    v = logvar - prior_logvar
    return 0.5 * ((mu - prior_mu) ** 2 * torch.exp(-prior_logvar) + (torch.expm1(v) - v))


def elbo(x: Tensor, recon: Tensor, recon_logvar: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The SGVB estimate for L = recon.shape[0] samples and a N(0, I) prior, per batch row ([KW14] equation 10).

    x `(B, D)`, recon and recon_logvar `(L, B, D)`, mu and logvar `(B, J)`; returns `(B,)`, in nats.
    """
    kl = gaussian_kl(mu, logvar, torch.zeros_like(mu), torch.zeros_like(logvar)).sum(-1)
    return -kl + gaussian_log_prob(x, recon, recon_logvar).sum(-1).mean(0)


# ---- the same equations with the options of the public functions: what autograd.py differentiates twice --------------------------


def accumulate_dtype(*tensors: object) -> torch.dtype:
    """float64 if any tensor is, float32 otherwise: the dtype of all arithmetic and of every loss."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors if isinstance(t, Tensor)] else torch.float32


def _present(weight: Tensor | None, *tensors: Tensor) -> Sequence[Tensor]:
    """Replace what lies under a weight of 0 *before* any arithmetic: masking afterwards leaves 0 * NaN in the gradients."""
    return tensors if weight is None else [torch.where(weight == 0, torch.zeros_like(t), t) for t in tensors]


def _reduce(terms: Tensor, weight: Tensor | None, keep: int) -> Tensor:
    """Weigh, then sum all but the first `keep` dimensions."""
    if weight is not None:
        terms = terms * weight
        terms = torch.where(weight == 0, torch.zeros_like(terms), terms)
    dims = tuple(range(keep, terms.ndim))
    return terms.sum(dims) if dims else terms


def nll(
    recon: Tensor, x: Tensor, var: Tensor | float, weight: Tensor | None, kind: str, full: bool, eps: float, keep: int
) -> Tensor:
    """Sum of `-weight * log N(x; recon, var)` over all but the first `keep` dimensions.

    `kind` says what `var` holds: "logvar", "std" or "var". A "var" is raised to at least `eps`, and the gradient passes
    through that clamp as it does in `torch.nn.functional.gaussian_nll_loss`.
    """
    acc = accumulate_dtype(recon, x, var)
    recon, x = recon.to(acc), x.to(acc)
    var = var.to(acc) if isinstance(var, Tensor) else torch.full((), var, dtype=acc, device=recon.device)
    recon, x, var = _present(weight, recon, x, var.expand(recon.shape)) if weight is not None else (recon, x, var)
    if kind == "var":
        var = var.clone()
        with torch.no_grad():
            var.clamp_(min=eps)
        if weight is not None:
            var = torch.where(weight == 0, torch.ones_like(var), var)
        logvar, square = torch.log(var), (recon - x) ** 2 / var
    elif kind == "std":
        if weight is not None:
            var = torch.where(weight == 0, torch.ones_like(var), var)
        logvar, square = 2 * torch.log(var), ((recon - x) / var) ** 2
    else:
        logvar, square = var, (recon - x) ** 2 * torch.exp(-var)
    terms = 0.5 * (logvar + square) + (0.5 * LOG_2PI if full else 0.0)
    return _reduce(terms, weight, keep)


def linear_nll(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, var: Tensor | float, full: bool, keep: int) -> Tensor:
    """`nll` of recon = h weight^T + bias, of shape `(N, D)`, with the log-variance `var`; row n belongs to row n % B of x."""
    acc = accumulate_dtype(h, x, weight, bias, var)
    recon = h.to(acc) @ weight.to(acc).T
    recon = recon if bias is None else recon + bias.to(acc)
    if recon.shape[0] != x.shape[0]:
        x = x.expand(recon.shape[0] // x.shape[0], *x.shape).flatten(0, 1)
    return nll(recon, x, var, None, "logvar", full, 0.0, keep)


def kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    weight: Tensor | None,
    clamp: tuple[float, float] | None,
    keep: int,
) -> Tensor:
    """Sum of `weight * KL` over all but the first `keep` dimensions; `clamp` bounds logvar, with zero gradient outside."""
    acc = accumulate_dtype(mu, logvar, prior_mu, prior_logvar)
    mu, logvar = mu.to(acc), logvar.to(acc)
    prior_mu = torch.zeros_like(mu) if prior_mu is None else prior_mu.to(acc)
    prior_logvar = torch.zeros_like(logvar) if prior_logvar is None else prior_logvar.to(acc)
    mu, logvar, prior_mu, prior_logvar = _present(weight, mu, logvar, prior_mu, prior_logvar)
    if clamp is not None:
        logvar = torch.clamp(logvar, *clamp)
    return _reduce(gaussian_kl(mu, logvar, prior_mu, prior_logvar), weight, keep)


def sample(mu: Tensor, logvar: Tensor, eps: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    """z in mu's dtype, of eps's shape: eps may carry a leading dimension of samples."""
    acc = accumulate_dtype(mu, logvar)
    wide = logvar.to(acc) if clamp is None else torch.clamp(logvar.to(acc), *clamp)
    return reparameterize(mu.to(acc), wide, eps.to(acc)).to(mu.dtype)
