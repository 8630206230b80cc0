"""Where the decoder ends in a linear layer: from its input and x straight to the loss, with no reconstruction in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, reference
from .autograd import LinearELBO, LinearNLL
from .functional import (
    Scalar,
    _check_pair,
    _check_prior,
    _check_rows,
    _check_samples,
    _check_scalar,
    _check_tensor,
    _check_variance,
    _noise,
    _scale,
    _shape,
    gaussian_nll,
    reparameterize_kl,
)
from .tracing import one_node

_PRECISIONS = (None, "ieee", "tf32", "tf32x3")


def _check_matrix(name: str, t: Any, rows: str, columns: str, device: torch.device | None = None) -> None:
    _check_tensor(name, t, device)
    if t.ndim != 2:
        raise ValueError(f"{name} must be a matrix ({rows}, {columns}), got shape {_shape(t)}")


def _check_layer(x: Any, weight: Any, bias: Any, logvar: Any, name: str, precision: Any) -> Tensor | float:
    """Check x and what maps to it; return the log-variance."""
    _check_matrix("x", x, "batch", "elements")
    _check_matrix("weight", weight, "elements", "hidden", x.device)
    if weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight has shape {_shape(weight)}, but x has shape {_shape(x)}: weight must have a row for each column of x, as in "
            "torch.nn.Linear"
        )
    if bias is not None:
        _check_tensor("bias", bias, x.device)
        if bias.shape != x.shape[1:]:
            raise ValueError(f"bias has shape {_shape(bias)}, expected one value for each of {x.shape[1]} columns of x")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, _PRECISIONS))}, got {precision!r}")
    var, _ = _check_variance(name, "logvar", 0.0 if logvar is None else logvar, x)
    if isinstance(var, Tensor) and var.numel() != 1 and var.shape != x.shape[1:]:
        raise ValueError(f"{name} has shape {_shape(var)}, expected one value, or one for each of {x.shape[1]} columns of x")
    return var


def _linear_nll(
    h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, var: Tensor | float, full: bool, keep: int, scale: Scalar,
    precision: str | None, impl: str | None,
) -> Tensor:  # fmt: skip
    """The scaled sums of all terms, or of those of each row of h, of which x may have several."""
    chosen = backend.choose(impl, x.device, not (h.numel() and x.numel()))
    if chosen is None:
        return scale * reference.linear_nll(h, x, weight, bias, var, full, keep)
    if torch.compiler.is_compiling():
        # A loop over tiles would unroll; Inductor fuses what follows a product of its own.
        acc = reference.accumulate_dtype(h, x, weight, bias, var)
        recon = F.linear(h.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
        samples = h.shape[0] // x.shape[0]  # not len(), which is a number in every graph
        rows = x if samples == 1 else x.expand(samples, *x.shape).flatten(0, 1)
        return scale * gaussian_nll(recon, rows, logvar=var, full=full, reduction="none" if keep else "sum", impl=impl)
    return LinearNLL.apply(h, x, weight, bias, var, (full, keep, scale, precision, torch.is_grad_enabled(), chosen))


@one_node
def linear_gaussian_nll(
    h: Tensor,
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    logvar: Tensor | float | None = None,
    full: bool = True,
    reduction: str = "none",
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """-log N(x; h weight^T + bias, exp(logvar)), in nats, without the `(batch, elements)` mean or its gradient in memory.

    What `gaussian_nll(F.linear(h, weight, bias), x, logvar=logvar)` computes (Kingma & Welling 2014, appendix C.2), for the last
    layer of any decoder. Products are recomputed in backward where the forward pass has not written the gradients. Under
    torch.compile, and with impl="reference", the mean is in memory after all; x's gradient, if asked for, has x's size anyway.

    Args:
        h: Input of the layer, `(batch, hidden)`, of any floating dtype.
        weight: `(elements, hidden)`, as in `torch.nn.Linear`.
        x: Data, `(batch, elements)`.
        bias: `(elements,)` or None.
        logvar: Log-variance: None is unit variance; a number; or a tensor, learned or not, of one value or of one for each
            element, `(elements,)`.
        full: Include the constant (1/2) log 2 pi per element.
        reduction: "none" is per sample, `(batch,)`; "batchmean" is their mean; "sum" sums everything; "mean" divides by the number
            of elements.
        precision: Of float32 products on a GPU: "ieee", "tf32x3" or "tf32"; None is what `torch.get_float32_matmul_precision()`
            says: highest, high or medium, in this order. Elsewhere torch's settings rule. Where products are torch's own (hidden
            sizes above 128) "tf32x3" is "ieee".
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The negative log-likelihood in float32 (float64 if any input is), differentiable in h, weight, x, bias and logvar, twice.
        Half precision: products take h and weight as they are and accumulate in float32; the mean is not rounded.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    var = _check_layer(x, weight, bias, logvar, "logvar", precision)
    _check_matrix("h", h, "batch", "hidden", x.device)
    if h.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(f"h has shape {_shape(h)}, expected (batch, hidden) = {(x.shape[0], weight.shape[1])} by x and weight")
    keep = _check_rows(reduction, 1, 2)
    return _linear_nll(h, x, weight, bias, var, bool(full), keep, _scale(reduction, 1, x.shape, None), precision, impl)


@one_node
def linear_elbo_loss(
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recon_logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    beta: float | Tensor = 1.0,
    num_samples: int | None = None,
    eps: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    full: bool = True,
    reduction: str = "batchmean",
    return_terms: bool = False,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The negative ELBO of a VAE whose decoder is one linear layer: -log N(x; z weight^T + bias, exp(recon_logvar)) + beta * KL.

    z is sampled from N(mu, exp(logvar)), on a GPU by the kernel that uses it, and the reconstruction is not in memory, but where
    `linear_gaussian_nll` says: Kingma & Welling 2014, equation 10, for linear VAEs and pPCA (Lucas et al. 2019), linearly decoded
    single-cell models, tabular and recommender decoders.

    Args:
        x: Data, `(batch, elements)`.
        mu, logvar: The posterior, `(batch, latents)`.
        weight: The decoder's matrix, `(elements, latents)`, as in `torch.nn.Linear`.
        bias: `(elements,)` or None.
        recon_logvar: Log-variance of the likelihood: None is unit variance; a number; or a tensor, learned or not, of one value or
            of one for each element, `(elements,)`.
        num_samples: None for one sample of z per data point; L to average the likelihood over L of them.
        eps, seed, generator: The noise, as in `reparameterize`: the same seed gives the same z, and the same loss as
            `reparameterize_kl`, a matrix product and `gaussian_nll` give one after the other.
        prior_mu, prior_logvar, beta, full, reduction, return_terms, impl: As in `elbo_loss`.
        precision: As in `linear_gaussian_nll`.

    Returns:
        The loss in nats, differentiable in x, mu, logvar, weight, bias, recon_logvar and the prior; with `return_terms`
        (loss, nll, kl), the terms without gradient.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two sources of noise are given.
    """
    var = _check_layer(x, weight, bias, recon_logvar, "recon_logvar", precision)
    _check_pair("mu", mu, "logvar", logvar, x.device)
    if mu.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(f"mu has shape {_shape(mu)}, expected (batch, latents) = {(x.shape[0], weight.shape[1])} by x and weight")
    beta = _check_scalar("beta", beta, x.device)
    if num_samples is not None:
        _check_samples(num_samples)
    samples, keep = num_samples or 1, _check_rows(reduction, 1, 2)
    scale, kl_scale = (_scale(reduction, 1, t.shape, None) for t in (x, mu))
    scale = scale / samples
    chosen = backend.choose(impl, x.device, not (mu.numel() and x.numel()))
    if chosen is None or torch.compiler.is_compiling():
        z, kl = reparameterize_kl(
            mu, logvar, prior_mu, prior_logvar, num_samples=num_samples, eps=eps, seed=seed, generator=generator,
            reduction=reduction, impl=impl,
        )  # fmt: skip
        rows = z if num_samples is None else z.flatten(0, 1)
        nll = _linear_nll(rows, x, weight, bias, var, bool(full), keep, scale, precision, impl)
        if keep and num_samples is not None:
            nll = nll.view(samples, -1).sum(0)
        loss = nll + (beta.to(kl.dtype) if isinstance(beta, Tensor) else beta) * kl
        return (loss, nll.detach(), kl.detach()) if return_terms else loss
    prior = _check_prior("prior_mu", prior_mu, mu), _check_prior("prior_logvar", prior_logvar, mu)
    noise = _noise(mu, num_samples, eps, seed, generator)
    options = num_samples, bool(full), keep, scale, kl_scale, beta, precision, return_terms, torch.is_grad_enabled(), chosen
    return LinearELBO.apply(x, mu, logvar, weight, bias, var, *prior, *noise, options)
