"""The public functions: check the arguments, choose the noise and the backend, call autograd, reduce.

Conventions of every function here. Tensors are `(batch, ...)` of any rank. Losses are in nats, in float32 (float64 if any input
is). Half precision is widened before any arithmetic. No input is written to. Gradients have their input's dtype and shape.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backend, reference
from .autograd import ELBO, ELBOTerms, GaussianNLL, Latent
from .noise import check_seed, draw_seed, sample_noise
from .tracing import FLOAT, INT, NUMBER, one_node

Scalar = float | Tensor

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_REDUCTIONS = ("none", "batchmean", "sum", "mean")


# ---- checks: each names the argument, what it was and what was expected ---------------------------------------------------------


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _check_tensor(name: str, t: Any, device: torch.device | None = None) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} is on {t.device}, but the first argument is on {device}: all tensors must share a device")


def _check_pair(name_a: str, a: Any, name_b: str, b: Any, device: torch.device | None = None) -> None:
    _check_tensor(name_a, a, device)
    _check_tensor(name_b, b, a.device)
    if a.shape != b.shape:
        raise ValueError(f"{name_b} has shape {_shape(b)}, but {name_a} has shape {_shape(a)}: they must be equal")


def _check_broadcast(name: str, t: Tensor, to: str, shape: torch.Size) -> None:
    if t.shape == shape:
        return
    lead = len(shape) - t.ndim
    if lead < 0 or any(n not in (1, m) for n, m in zip(t.shape, shape[lead:], strict=True)):
        raise ValueError(f"{name} has shape {_shape(t)}, which does not broadcast to the shape {tuple(shape)} of {to}")


def _check_rows(reduction: str, batch_dims: int, ndim: int) -> int:
    """Check reduction and batch_dims; return how many leading dimensions the sum keeps."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")
    if isinstance(batch_dims, bool) or not isinstance(batch_dims, INT):
        raise TypeError(f"batch_dims must be an int, got {type(batch_dims).__name__}")
    if not 0 <= batch_dims <= ndim:
        raise ValueError(f"batch_dims must be between 0 and the number of dimensions, {ndim}, got {batch_dims}")
    return batch_dims if reduction == "none" else 0


def _check_weight(weight: Any, to: str, shape: torch.Size, device: torch.device) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor or None, got {type(weight).__name__}")
    if weight.dtype == torch.bool:
        if weight.device != device:
            raise ValueError(
                f"weight is on {weight.device}, but the first argument is on {device}: all tensors must share a device"
            )
    else:
        _check_tensor("weight", weight, device)
    if weight.requires_grad:
        raise ValueError("weight requires grad, but is a constant here: detach it, or weigh the result of reduction='none'")
    _check_broadcast("weight", weight, to, shape)


def _check_scalar(name: str, value: Any, device: torch.device) -> Scalar:
    """A run-time factor: a number, or a 0-d tensor on the inputs' device or the CPU, which gets no gradient."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.is_complex():
            raise ValueError(f"{name} must be a number or a 0-d real tensor, got shape {_shape(value)} of {value.dtype}")
        if value.requires_grad:
            raise ValueError(f"{name} requires grad, but is a constant here: detach it, or combine the terms of elbo_terms")
        if value.device == device:
            return value
        if value.device.type == "cpu":
            return value if torch.compiler.is_compiling() else float(value)
        raise ValueError(f"{name} is on {value.device}, but the first argument is on {device}: it must be there or on the CPU")
    if isinstance(value, bool) or not isinstance(value, NUMBER):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    return value


def _check_clamp(clamp: Any) -> tuple[float, float] | None:
    if clamp is None:
        return None
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise TypeError(f"logvar_clamp must be a pair (lo, hi) of numbers or None, got {clamp!r}")
    lo, hi = clamp
    if any(isinstance(c, bool) or not isinstance(c, NUMBER) for c in (lo, hi)):
        raise TypeError(f"logvar_clamp must be a pair (lo, hi) of numbers or None, got {clamp!r}")
    lo, hi = float(lo), float(hi)
    if not lo <= hi:
        raise ValueError(f"logvar_clamp must be (lo, hi) with lo <= hi, got ({lo}, {hi})")
    return lo, hi


def _check_prior(name: str, prior: Any, mu: Tensor) -> Tensor | None:
    """A prior parameter as a tensor of mu's shape. Expanding is autograd's business, so a shared prior gets its summed gradient."""
    if prior is None:
        return None
    if isinstance(prior, NUMBER) and not isinstance(prior, bool):
        if torch.compiler.is_compiling():
            return _symbolic(prior, mu).expand(mu.shape)
        return torch.full((), prior, dtype=reference.accumulate_dtype(mu), device=mu.device).expand(mu.shape)
    _check_tensor(name, prior, mu.device)
    _check_broadcast(name, prior, "mu", mu.shape)
    if prior.shape == mu.shape:
        return prior
    if prior.dtype.itemsize < 4:
        # Autograd sums the gradients of an expanded tensor in its dtype: one rounding for each element in half precision.
        prior = prior.float()
    return prior.expand(mu.shape)


def _check_variance(name: str, kind: str, var: Any, recon: Tensor) -> tuple[Tensor | float, str]:
    """A variance and what it holds: a tensor that broadcasts to recon as it is, and a number as a log-variance."""
    if isinstance(var, Tensor):
        _check_tensor(name, var, recon.device)
        _check_broadcast(name, var, "recon", recon.shape)
        return var, kind
    if isinstance(var, bool) or not isinstance(var, NUMBER):
        raise TypeError(f"{name} must be a number or a torch.Tensor, got {type(var).__name__}")
    if kind != "logvar" and not var > 0:
        raise ValueError(f"{name} must be positive, got {var}")
    factor = 2 if kind == "std" else 1
    if torch.compiler.is_compiling() and isinstance(var, FLOAT):
        value = _symbolic(var, recon)
        return (value if kind == "logvar" else torch.log(value) * factor), "logvar"
    return (float(var) if kind == "logvar" else math.log(var) * factor), "logvar"


def _symbolic(value: float, like: Tensor) -> Tensor:
    """A number in a traced function. Added to a tensor it stays symbolic; as anything else every new value is a new graph."""
    return torch.zeros((), dtype=reference.accumulate_dtype(like), device=like.device) + value


def _scale(reduction: str, batch_dims: int, shape: torch.Size, weight: Tensor | None, *inputs: Any) -> Scalar:
    """The factor that turns a total over `inputs` into the reduction."""
    if reduction in ("sum", "none"):
        return 1.0
    if reduction == "batchmean":
        count = shape[0] if batch_dims == 1 else math.prod(shape[:batch_dims])
        return 1.0 / count if count else math.nan
    if weight is not None:
        count = weight.numel()
        return (count / math.prod(shape) if count else math.nan) / weight.sum(dtype=reference.accumulate_dtype(*inputs))
    count = math.prod(shape)
    return 1.0 / count if count else math.nan


def _check_samples(num_samples: Any) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, INT):
        raise TypeError(f"num_samples must be an int, got {type(num_samples).__name__}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")


def _noise(
    mu: Tensor, num_samples: int | None, eps: Any, seed: Any, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """The noise as (eps, None) or as (None, seed), by the rule that the README tabulates."""
    if num_samples is not None:
        _check_samples(num_samples)
    given = [name for name, v in (("eps", eps), ("seed", seed), ("generator", generator)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"give at most one of eps, seed and generator, got {' and '.join(given)}")
    shape = mu.shape if num_samples is None else torch.Size((num_samples, *mu.shape))
    if eps is not None:
        _check_tensor("eps", eps, mu.device)
        if eps.shape != shape:
            raise ValueError(f"eps has shape {_shape(eps)}, but z will have shape {tuple(shape)}: they must be equal")
        if eps.requires_grad:
            raise ValueError("eps requires grad, but noise is a constant here: detach it")
        return eps, None
    if seed is not None:
        return None, check_seed(seed, mu.device)
    if mu.device.type == "cuda":
        return None, draw_seed(mu.device, generator)
    # What `randn_like` gave the code before the swap, so that torch.manual_seed reproduces it.
    if num_samples is None:
        return (torch.randn_like(mu) if generator is None else torch.empty_like(mu).normal_(generator=generator)).detach(), None
    return torch.randn(shape, generator=generator, dtype=mu.dtype, device=mu.device), None


# ---- before the decoder ----------------------------------------------------------------------------------------------------------


def _latent(
    mu: Tensor, logvar: Tensor, prior_mu: Any, prior_logvar: Any, weight: Tensor | None, clamp: Any, reduction: str,
    batch_dims: int, noise: tuple[Any, ...] | None, num_samples: int | None, want_kl: bool, impl: str | None,
    moments: Tensor | None = None, dim: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """z (if `noise`, which is (eps, seed, generator), is given) and the KL (if wanted).

    mu and logvar may be the halves of `moments` along `dim`, which then gets one packed gradient.
    """
    keep = _check_rows(reduction, batch_dims, mu.ndim)
    prior_mu = _check_prior("prior_mu", prior_mu, mu)
    prior_logvar = _check_prior("prior_logvar", prior_logvar, mu)
    _check_weight(weight, "mu", mu.shape, mu.device)
    clamp = _check_clamp(clamp)
    eps, seed = (None, None) if noise is None else _noise(mu, num_samples, *noise)
    scale = _scale(reduction, batch_dims, mu.shape, weight, mu, logvar, prior_mu, prior_logvar)
    chosen = backend.choose(impl, mu.device, not mu.numel())
    if chosen is None:
        normals = eps if seed is None else sample_noise(mu, seed, num_samples)
        z = None if normals is None else reference.sample(mu, logvar, normals, clamp)
        kl = scale * reference.kl(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep) if want_kl else None
        return z, kl
    traced = torch.compiler.is_compiling()
    packed = None if moments is None else dim
    options = clamp, keep, 1.0 if traced else scale, num_samples, want_kl, packed, torch.is_grad_enabled(), chosen
    posterior = (mu, logvar) if moments is None else (moments, None)
    z, kl = Latent.apply(*posterior, prior_mu, prior_logvar, weight, eps, seed, options)
    return z, kl * scale if traced and want_kl else kl


@one_node
def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    eps: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str | None = None,
) -> Tensor:
    """Sample z = mu + exp(logvar / 2) * eps, eps ~ N(0, I): Kingma & Welling 2014, section 2.4.

    Args:
        mu: Means, of any shape and floating dtype.
        logvar: Log-variances, of mu's shape.
        num_samples: None for one sample of mu's shape; L for samples of shape `(L, *mu.shape)`.
        eps: The noise itself, of z's shape; a constant.
        seed: An int or a 0-d int64 tensor on mu's device: counter-based Philox4x32-10 noise, the same on every device. Nothing is
            stored for backward, which regenerates it.
        generator: Source of the noise (CPU) or of a fresh seed (GPU). At most one of eps, seed and generator may be given. With
            none, the CPU draws what `torch.randn_like(mu)` would, and a GPU draws a seed without a host synchronisation.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        z in mu's dtype, differentiable in mu and logvar.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two sources of noise are given.
    """
    _check_pair("mu", mu, "logvar", logvar)
    z, _ = _latent(
        mu, logvar, None, None, None, None, "none", 0, (eps, seed, generator), num_samples, False,
        impl,
    )  # fmt: skip
    return z


@one_node
def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    num_samples: int | None = None,
    eps: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    logvar_clamp: tuple[float, float] | None = None,
    weight: Tensor | None = None,
    reduction: str = "none",
    batch_dims: int = 1,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample z and compute KL(N(mu, exp(logvar)) || prior) in one pass over mu and logvar.

    The two are those of `reparameterize` and `gaussian_kl`, whose arguments it takes; `logvar_clamp` bounds logvar for both, with
    zero gradient outside. The KL does not depend on `num_samples`.

    Returns:
        (z, kl): z in mu's dtype, kl in nats, both differentiable in mu and logvar, kl in the prior too.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two sources of noise are given.
    """
    _check_pair("mu", mu, "logvar", logvar)
    return _latent(
        mu, logvar, prior_mu, prior_logvar, weight, logvar_clamp, reduction, batch_dims,
        (eps, seed, generator), num_samples, True, impl,
    )  # fmt: skip


@one_node
def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    logvar_clamp: tuple[float, float] | None = None,
    weight: Tensor | None = None,
    reduction: str = "none",
    batch_dims: int = 1,
    impl: str | None = None,
) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))), in nats: Kingma & Welling 2014, appendix B.

    Computed as 1/2 [ (mu - prior_mu)^2 / prior_var + (e^v - 1 - v) ] with v = logvar - prior_logvar and a series for small v, so
    that it does not cancel near the prior: it is never negative.

    Args:
        mu: Means, of any shape and floating dtype.
        logvar: Log-variances, of mu's shape.
        prior_mu: Mean of the prior: a number or a tensor that broadcasts to mu; None is 0.
        prior_logvar: Log-variance of the prior, likewise; None is 0.
        logvar_clamp: (lo, hi) to clamp logvar to, with zero gradient outside, as latent-diffusion code does.
        weight: A bool mask or floating weights that broadcast to mu; a constant. Where it is 0 the element is absent: a NaN under
            it reaches neither loss nor gradient.
        reduction: "none" sums all but the first `batch_dims` dimensions; "batchmean" is the mean of those sums over the batch;
            "sum" sums everything; "mean" divides by the number of elements, or by the sum of the weights.
        batch_dims: How many leading dimensions are the batch. With "none" and `batch_dims=mu.ndim` nothing is summed.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The KL, differentiable in mu, logvar, prior_mu and prior_logvar.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    _check_pair("mu", mu, "logvar", logvar)
    _, kl = _latent(mu, logvar, prior_mu, prior_logvar, weight, logvar_clamp, reduction, batch_dims, None, None, True, impl)
    return kl


# ---- after the decoder -----------------------------------------------------------------------------------------------------------


def _nll(
    recon: Tensor, x: Tensor, var: Tensor | float, weight: Tensor | None, kind: str, full: bool, eps: float, reduction: str,
    batch_dims: int, impl: str | None,
) -> Tensor:  # fmt: skip
    keep = _check_rows(reduction, batch_dims, recon.ndim)
    scale = _scale(reduction, batch_dims, recon.shape, weight, recon, x, var)
    chosen = backend.choose(impl, recon.device, not recon.numel())
    if chosen is None:
        return scale * reference.nll(recon, x, var, weight, kind, full, eps, keep)
    if torch.compiler.is_compiling():
        return scale * GaussianNLL.apply(recon, x, var, weight, (kind, full, eps, keep, 1.0, torch.is_grad_enabled(), chosen))
    return GaussianNLL.apply(recon, x, var, weight, (kind, full, eps, keep, scale, torch.is_grad_enabled(), chosen))


@one_node
def gaussian_nll(
    recon: Tensor,
    x: Tensor,
    *,
    logvar: Tensor | float | None = None,
    std: Tensor | float | None = None,
    var: Tensor | float | None = None,
    full: bool = True,
    weight: Tensor | None = None,
    reduction: str = "none",
    batch_dims: int = 1,
    impl: str | None = None,
) -> Tensor:
    """-log N(x; recon, var) of a diagonal Gaussian, in nats: Kingma & Welling 2014, appendix C.2.

    Args:
        recon: Means, of any shape and floating dtype.
        x: Data, of recon's shape.
        logvar, std, var: The variance, in at most one of three forms: a number, or a tensor (0-d, per channel, per sample, per
            element) that broadcasts to recon. With none of them it is 1. Tensors are not checked for sign.
        full: Include the constant (1/2) log 2 pi per element, so that the value is the likelihood's.
        weight: A bool mask or floating weights that broadcast to recon; a constant. Where it is 0 the element is absent: a NaN
            under it reaches neither loss nor gradient.
        reduction: "none" sums all but the first `batch_dims` dimensions; "batchmean" is the mean of those sums over the batch;
            "sum" sums everything; "mean" divides by the number of elements, or by the sum of the weights.
        batch_dims: How many leading dimensions are the batch. With "none" and `batch_dims=recon.ndim` nothing is summed.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The negative log-likelihood, differentiable in recon, x and a tensor variance (whose gradient has its own shape). It is
        a density's, so it can be negative.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two forms of variance are given.
    """
    _check_pair("recon", recon, "x", x)
    given = {k: v for k, v in (("logvar", logvar), ("std", std), ("var", var)) if v is not None}
    if len(given) > 1:
        raise ValueError(f"give at most one of logvar, std and var, got {' and '.join(given)}")
    name, value = next(iter(given.items()), ("logvar", 0.0))
    value, kind = _check_variance(name, name, value, recon)
    _check_weight(weight, "recon", recon.shape, recon.device)
    return _nll(recon, x, value, weight, kind, bool(full), -math.inf, reduction, batch_dims, impl)


def _promote(a: Tensor, b: Tensor) -> torch.dtype:
    """`torch.result_type`, which does not trace, for floating a and any real b."""
    if a.ndim and not b.ndim:
        return a.dtype
    return b.dtype if b.ndim and not a.ndim and b.is_floating_point() else torch.promote_types(a.dtype, b.dtype)


@one_node
def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`, fused: the same values, gradients, broadcasting and errors.

    Args:
        input: Expectation of the Gaussian.
        target: Sample; broadcasts against input.
        var: Positive variance: a float, or a tensor of input's shape, of input's shape but for one dimension of size 1, or of
            input's shape without its last dimension.
        full: Include the constant (1/2) log 2 pi.
        eps: Lower bound of var. The gradient passes through the clamp, as torch's does.
        reduction: "none" (every element), "mean" or "sum".

    Returns:
        The loss in the dtype that torch would return; half precision is rounded once, at the end. Differentiable in input,
        target and var, twice. One deliberate difference: a negative var raises ValueError for CPU tensors as in torch, while on a
        GPU, where finding it would cost a host synchronisation, and under torch.compile its terms are NaN.

    Raises:
        ValueError: var has a negative entry or the wrong size, or reduction is unknown.
        RuntimeError: input and target do not broadcast.
    """
    if isinstance(var, FLOAT):
        if var < 0:
            raise ValueError("var has negative entry/entries")
    elif not isinstance(var, Tensor):
        raise TypeError(f"var must be a float or a torch.Tensor, got {type(var).__name__}")
    elif var.device.type == "cpu" and not torch.compiler.is_compiling() and torch.any(var < 0):
        raise ValueError("var has negative entry/entries")
    dtype = _promote(input, target)
    if isinstance(var, Tensor):
        if var.shape != input.shape:
            if input.shape[:-1] == var.shape:
                var = var.unsqueeze(-1)
            elif input.ndim != var.ndim or sum(n for m, n in zip(input.shape, var.shape, strict=True) if m != n) != 1:
                raise ValueError("var is of incorrect size")
        dtype, kind = torch.promote_types(dtype, _promote(input, var)), "var"
    elif torch.compiler.is_compiling():
        var, kind = torch.log(torch.clamp(_symbolic(var, input), min=eps)), "logvar"
    else:
        # The float's clamp, and its logarithm in double precision.
        var = max(var, eps)
        var, kind = (math.log(var) if var > 0 else -math.inf), "logvar"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    if not target.is_floating_point():
        target = target.to(dtype)
    return _nll(input, target, var, None, kind, full, eps, reduction, input.ndim, None).to(dtype)


def _check_elbo(
    recon: Any, x: Any, mu: Any, logvar: Any, recon_logvar: Any, prior_mu: Any, prior_logvar: Any, weight: Any, reduction: str,
    logvar_clamp: Any,
) -> tuple[Tensor | float, Tensor | None, Tensor | None, tuple[float, float] | None, int, Scalar, Scalar]:  # fmt: skip
    """Check what elbo_loss and elbo_terms share; return (var, prior_mu, prior_logvar, clamp, keep, nll_scale, kl_scale)."""
    _check_pair("recon", recon, "x", x)
    _check_pair("mu", mu, "logvar", logvar, recon.device)
    if not recon.ndim or not mu.ndim:
        raise ValueError(f"{'mu' if recon.ndim else 'recon'} must have a batch dimension, got a 0-d tensor")
    if recon.shape[0] != mu.shape[0]:
        raise ValueError(
            f"mu has a batch of {mu.shape[0]}, but recon has {recon.shape[0]}: the first dimension of all inputs is the batch"
        )
    var = 0.0 if recon_logvar is None else _check_variance("recon_logvar", "logvar", recon_logvar, recon)[0]
    _check_weight(weight, "recon", recon.shape, recon.device)
    return (
        var,
        _check_prior("prior_mu", prior_mu, mu),
        _check_prior("prior_logvar", prior_logvar, mu),
        _check_clamp(logvar_clamp),
        _check_rows(reduction, 1, 1),
        _scale(reduction, 1, recon.shape, weight, recon, x, var),
        _scale(reduction, 1, mu.shape, None),
    )


@one_node
def elbo_terms(
    recon: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    recon_logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    full: bool = True,
    logvar_clamp: tuple[float, float] | None = None,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The two terms of the negative ELBO, each differentiable by itself: (nll, kl).

    `elbo_loss` with the same arguments is `nll + beta * kl`. Use this where the terms are logged, weighted or scheduled apart.
    See `elbo_loss` for the arguments; with "none" both terms are `(batch,)`.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    checked = _check_elbo(recon, x, mu, logvar, recon_logvar, prior_mu, prior_logvar, weight, reduction, logvar_clamp)
    chosen = backend.choose(impl, recon.device, not (recon.numel() and mu.numel()))
    return _elbo_terms(recon, x, mu, logvar, weight, bool(full), reduction, chosen, *checked)


def _elbo_terms(
    recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor | None, full: bool, reduction: str,
    chosen: ModuleType | None, var: Tensor | float, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    clamp: tuple[float, float] | None, keep: int, nll_scale: Scalar, kl_scale: Scalar,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if chosen is None:
        nll = nll_scale * reference.nll(recon, x, var, weight, "logvar", full, 0.0, keep)
        return nll, kl_scale * reference.kl(mu, logvar, prior_mu, prior_logvar, None, clamp, keep)
    inputs = recon, x, var, mu, logvar, prior_mu, prior_logvar, weight
    if torch.compiler.is_compiling():
        nll, kl = ELBOTerms.apply(*inputs, (full, clamp, keep, 1.0, 1.0, torch.is_grad_enabled(), chosen))
        return nll_scale * nll, kl_scale * kl
    return ELBOTerms.apply(*inputs, (full, clamp, keep, nll_scale, kl_scale, torch.is_grad_enabled(), chosen))


@one_node
def elbo_loss(
    recon: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    recon_logvar: Tensor | float | None = None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    beta: float | Tensor = 1.0,
    full: bool = True,
    logvar_clamp: tuple[float, float] | None = None,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The negative ELBO of a Gaussian VAE, -log N(x; recon, exp(recon_logvar)) + beta * KL(N(mu, exp(logvar)) || prior), in nats.

    Kingma & Welling 2014, equation 10 with one sample (`sgvb_loss` takes more). The gradients are written in the pass that reads
    the inputs, so a training step reads and writes the least that it can.

    Args:
        recon: The decoder's mean, `(batch, ...)`.
        x: Data, of recon's shape.
        mu: Means of the posterior, `(batch, ...)`, with any latent shape.
        logvar: Log-variances of the posterior, of mu's shape.
        recon_logvar: Log-variance of the likelihood: None is unit variance; a number; or a tensor, learned or not, that
            broadcasts to recon (0-d, per channel, per dimension, per sample, per element).
        prior_mu, prior_logvar: The prior: numbers or tensors that broadcast to mu; None is 0. They may be learned.
        beta: Weight of the KL: a number or a 0-d tensor. A run-time value: changing it neither recompiles nor synchronises.
        full: Include the constant (1/2) log 2 pi per element, so that the value is in nats.
        logvar_clamp: (lo, hi) to clamp logvar to, with zero gradient outside.
        weight: A bool mask or floating weights of the likelihood terms, broadcastable to recon; a constant. Where it is 0 the
            element is absent, NaN or not. The KL is not weighted.
        reduction: "batchmean" is the mean over samples of the per-sample loss (the ELBO's own convention); "none" is per sample,
            `(batch,)`; "sum" sums everything; "mean" averages each term over its own elements (or weights), which makes the
            effective beta depend on the sizes: see `effective_beta`.
        return_terms: Return (loss, nll, kl), the two terms reduced likewise, without gradient and without beta, for logging.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The loss, differentiable in recon, x, mu, logvar, recon_logvar and the prior.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    checked = _check_elbo(recon, x, mu, logvar, recon_logvar, prior_mu, prior_logvar, weight, reduction, logvar_clamp)
    beta = _check_scalar("beta", beta, recon.device)
    chosen = backend.choose(impl, recon.device, not (recon.numel() and mu.numel()))
    # Per-sample losses meet upstream gradients that vary by row, and a trace keeps no state: both go through the terms, as does the
    # reference.
    if chosen is None or reduction == "none" or torch.compiler.is_compiling():
        nll, kl = _elbo_terms(recon, x, mu, logvar, weight, bool(full), reduction, chosen, *checked)
        loss = nll + (beta.to(kl.dtype) if isinstance(beta, Tensor) else beta) * kl
        return (loss, nll.detach(), kl.detach()) if return_terms else loss
    var, prior_mu, prior_logvar, clamp, _, nll_scale, kl_scale = checked
    options = bool(full), clamp, nll_scale, kl_scale, beta, bool(return_terms), torch.is_grad_enabled(), chosen
    return ELBO.apply(recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, options)


def effective_beta(
    kl_weight: float,
    *,
    elements: int,
    latents: int | None = None,
    recon_reduction: str = "mean",
    kl_reduction: str = "batchmean",
    variance: float = 1.0,
    batch_size: int | None = None,
) -> float:
    """The beta of the beta-VAE that `mse(recon, x, recon_reduction) + kl_weight * KL(kl_reduction)` really trains.

    With a fixed variance s^2, -log p(x|z) = SSE / (2 s^2) + const, so any such loss is, up to a factor, SSE / (2 s^2) + beta * KL.
    `mse(reduction="mean") + w * KL(batchmean)` is beta = w * D / 2 at s^2 = 1; `mse(reduction="sum") + KL(sum)` is the ELBO at
    s^2 = 1/2.

    Args:
        kl_weight: The factor of the KL in that loss.
        elements: D, elements of x per sample.
        latents: J, latents per sample; needed for `kl_reduction="mean"`.
        recon_reduction: How the squared error is reduced: "mean" (over everything), "batchmean" or "sum".
        kl_reduction: How the KL is reduced, likewise.
        variance: s^2, the fixed variance of the likelihood that the loss is read with.
        batch_size: B; needed where one term is summed over the batch and the other averaged.

    Raises:
        ValueError: A reduction is unknown, a size that it needs is missing, or a size or variance is not positive.
    """
    for name, value in (("recon_reduction", recon_reduction), ("kl_reduction", kl_reduction)):
        if value not in _REDUCTIONS[1:]:
            raise ValueError(f"{name} must be one of 'batchmean', 'sum', 'mean', got {value!r}")
    if kl_reduction == "mean" and latents is None:
        raise ValueError("latents is needed for kl_reduction='mean'")
    mixed = (recon_reduction == "sum") != (kl_reduction == "sum")
    if mixed and batch_size is None:
        raise ValueError("batch_size is needed where one reduction is 'sum' and the other is not")
    for name, size in (("elements", elements), ("latents", latents), ("variance", variance), ("batch_size", batch_size)):
        if size is not None and not size > 0:
            raise ValueError(f"{name} must be positive, got {size}")
    batch = batch_size or 1
    squares_over = {"sum": 1, "batchmean": batch, "mean": batch * elements}[recon_reduction]
    kl_over = {"sum": 1, "batchmean": batch, "mean": batch * (latents or 1)}[kl_reduction]
    return kl_weight * squares_over / (2 * variance * kl_over)
