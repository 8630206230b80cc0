"""From arguments to the fields of a record: priors in mu's shape, numbers that stay symbolic in a trace, factors, noise.

Each function that is named like an argument checks it first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .dtypes import accumulate_dtype, plain
from .noise import check_seed, draw_seed
from .specs import KL, Factor, LatentInputs, Likelihood
from .tracing import NUMBER
from .types import Number, Reduction, Seed

# The forms of a posterior's spread, and of a prior's.
FORMS = ("logvar", "logstd", "std", "var")


def symbolic(value: Any, like: Tensor) -> Tensor:
    """A number in a traced function. Added to a tensor it stays symbolic; as anything else every new value is a new graph."""
    return torch.zeros((), dtype=accumulate_dtype(like), device=like.device) + value


def factor(name: str, value: Tensor | Number, like: Sequence[Tensor | None], device: torch.device, batch: int) -> Factor:
    """A factor, () or (batch,), in the dtype of the arithmetic: a product with half precision would be rounded to its dtype."""
    beta: Factor = plain(value)
    checks.factor(name, beta, device, batch)
    if not isinstance(beta, Tensor):
        return beta
    beta = beta.reshape(()) if beta.ndim and beta.shape[0] == 1 else beta
    # A copy: backward reads it, and its owner may write to it before.
    return beta.to(device, accumulate_dtype(*like), non_blocking=True, copy=True)


def is_constant(beta: Factor) -> bool:
    """Whether an op can take beta as one number: it gets no gradient there, and is the same for all samples."""
    return not isinstance(beta, Tensor) or not (beta.ndim or beta.requires_grad)


def is_per_sample(beta: Factor) -> bool:
    return isinstance(beta, Tensor) and beta.ndim > 0


def before_beta(beta: Factor, kl: KL) -> KL:
    """The record of the KL that beta multiplies: of each sample, unscaled, where beta is one for each."""
    return kl._replace(keep=1, scale=1.0) if is_per_sample(beta) else kl


def weighed(beta: Factor, kl: Tensor, spec: KL) -> tuple[Tensor, Tensor]:
    """beta * kl and kl as `spec` reduces them, of the kl that `before_beta` describes."""
    product = beta * kl
    if spec.keep or not is_per_sample(beta):
        return product, kl
    return product.sum() * spec.scale, kl.sum() * spec.scale


def weight_of(name: str, value: Tensor, to: str, t: Tensor) -> Tensor:
    """A bool mask or weights; integers, as attention masks are, count as numbers."""
    checks.weight(name, value, to, t.shape, t.device)
    return value if value.dtype == torch.bool or value.is_floating_point() else value.float()


def variance(
    name: str, parameter: str, value: Tensor | Number | None, recon: Tensor, to: str = "recon"
) -> tuple[Tensor | None, str, float]:  # fmt: skip
    """A variance as the inputs' tensor, what that holds, and the log-variance that stands for a missing tensor."""
    if value is None:
        return None, "logvar", 0.0
    value = plain(value)
    checks.variance(name, parameter, value, recon, to)
    if isinstance(value, Tensor):
        return value, parameter, 0.0
    if parameter == "theta":
        return symbolic(value, recon), parameter, 0.0
    factor = 2 if parameter == "std" else 1
    if torch.compiler.is_compiling() and isinstance(value, NUMBER):
        number = symbolic(value, recon)
        return (number if parameter == "logvar" else torch.log(number) * factor), "logvar", 0.0
    return None, "logvar", float(value) if parameter == "logvar" else math.log(value) * factor


def of_image(spec: Likelihood, x_scale: Any, x_shift: Any, acc: torch.dtype) -> Likelihood:
    """The record with what an x of uint8 is scaled and shifted by, as numbers of the dtype of the arithmetic."""
    numbers = [float(plain(n)) for n in (x_scale, 0.0 if x_shift is None else x_shift)]
    if acc == torch.float32 and not torch.compiler.is_compiling():
        numbers = [float(np.float32(n)) for n in numbers]
    return spec._replace(x_scale=numbers[0], x_shift=numbers[1])


def bin_of(count: Any, low: Any, high: Any, acc: torch.dtype) -> tuple[float, float, float]:
    """Half a bin, where the first bin ends and where the last begins, as numbers of the dtype of the arithmetic."""
    checks.bins(count, low, high)
    low, high = float(plain(low)), float(plain(high))
    half = (high - low) / (2 * (plain(count) - 1))
    numbers = [half, low + half, high - half]
    if acc == torch.float32 and not torch.compiler.is_compiling():
        numbers = [float(np.float32(n)) for n in numbers]
    return numbers[0], numbers[1], numbers[2]


def spread_of(family: str, recon_logvar: Any, recon_logscale: Any) -> tuple[str, Any]:
    """The name and the value of what spreads the likelihood; a Bernoulli distribution has nothing of the kind."""
    checks.family(family)
    takes = {"gaussian": "recon_logvar", "laplace": "recon_logscale"}.get(family)
    for name, value in (("recon_logvar", recon_logvar), ("recon_logscale", recon_logscale)):
        if value is not None and name != takes:
            raise ValueError(f"{name} is given, but likelihood={family!r} takes {takes or 'none'}")
    if isinstance(recon_logvar, str) and recon_logvar != "optimal":
        raise TypeError(f"recon_logvar must be a number or a torch.Tensor, got str {recon_logvar!r}: the one string is 'optimal'")
    return ("recon_logscale", recon_logscale) if family == "laplace" else ("recon_logvar", recon_logvar)


def prior(name: str, value: float | Tensor, mu: Tensor) -> Tensor:
    """A prior's parameter in mu's shape. Expanding is autograd's business, so a shared prior gets its summed gradient."""
    value = plain(value)
    checks.prior(name, value, mu)
    if isinstance(value, NUMBER):
        if torch.compiler.is_compiling():
            return symbolic(value, mu).expand(mu.shape)
        return mu.new_full((), value, dtype=accumulate_dtype(mu), device=mu.device).expand(mu.shape)
    assert isinstance(value, Tensor)
    if value.ndim == mu.ndim and value.shape == mu.shape:
        return value
    return expanded(value, mu.shape)


def below_samples(x: Any, recon: Any) -> Any:
    """x over the samples that are recon's first dimension, if recon has one more than x; otherwise x itself."""
    are_tensors = isinstance(x, Tensor) and isinstance(recon, Tensor)
    if not are_tensors or x.ndim != recon.ndim - 1 or recon.shape[1:] != x.shape:
        return x
    return expanded(x, recon.shape) if x.requires_grad else x.expand(recon.shape)


def samples_within(batch_dims: int, recon: Tensor, x: Tensor, *others: Any) -> tuple[Any, ...]:
    """recon `(samples, *batch, ...)` as `(*batch, samples, ...)`, and views of what broadcasts to it."""
    out = [t.movedim(0, batch_dims) for t in (recon, below_samples(x, recon))]
    after = recon.ndim - 1 - batch_dims  # dimensions behind the batch
    for t in others:
        if isinstance(t, Tensor) and t.ndim > after:
            t = t.movedim(0, batch_dims) if t.ndim == recon.ndim else t.unsqueeze(t.ndim - after)
        out.append(t)
    return tuple(out)


def term_scale(name: str, value: Any, like: Sequence[Tensor | None], device: torch.device) -> Factor:
    """What a term is multiplied by: a number, or a constant tensor of one value; None is 1."""
    if value is None:
        return 1.0
    scale = factor(name, value, like, device, 1)
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} requires grad, but is a constant here: detach it, or multiply the terms of elbo_terms")
    return scale


def against_priors(posterior: Sequence[Tensor], *priors: Any) -> Sequence[Tensor]:
    """mu or logvar or both, as the prior's tensors broadcast them; unchanged where the shapes do not fit, which a check says."""
    if not any(isinstance(p, Tensor) for p in priors):
        return posterior
    own = posterior[0].shape
    # Equal shapes first: in a trace each comparison of sizes is a condition on the batch.
    shapes = [p.shape for p in priors if isinstance(p, Tensor) and not (p.ndim == len(own) and p.shape == own)]
    if all(len(s) <= len(own) and all(m in (1, n) for m, n in zip(s[::-1], own[::-1], strict=False)) for s in shapes):
        return posterior
    try:
        shape = torch.broadcast_shapes(own, *shapes)
    except RuntimeError:
        return posterior
    return [expanded(t, shape) for t in posterior]


def expanded(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Autograd sums the gradients of an expanded tensor in its dtype: one rounding for each element in half precision."""
    return (t.float() if t.dtype.itemsize < 4 else t).expand(shape)


def scale_of(
    reduction: str, batch_dims: int, shape: torch.Size, weight: Tensor | None = None, like: Sequence[Tensor | None] = ()
) -> Factor:
    """The factor that turns a total over `shape` into the reduction; a mean over nothing is NaN.

    The dtype of the arithmetic with the tensors `like` is that of a sum of weights.
    """
    if reduction in ("sum", "none"):
        return 1.0
    if reduction == "mean" and weight is not None:
        # Over what the weight broadcasts to, it sums to this many times its own sum.
        times = math.prod(shape) / weight.numel() if weight.numel() else 0
        return (1.0 / times if times else math.nan) / weight.sum(dtype=accumulate_dtype(*like))
    count = math.prod(shape[:batch_dims] if reduction == "batchmean" else shape)
    return 1.0 / count if count else math.nan


def summed(t: Tensor, shape: torch.Size, keep: int) -> Tensor:
    """The sum of t, broadcast to `shape`, over all but the first `keep` dimensions, computed in t's own shape."""
    t = t.reshape((1,) * (len(shape) - t.ndim) + t.shape)
    times = math.prod(n for n, own in zip(shape[keep:], t.shape[keep:], strict=True) if own == 1)
    return ((t.sum(tuple(range(keep, t.ndim))) if keep < t.ndim else t) * times).expand(shape[:keep])


def noise(
    mu: Tensor, num_samples: int | None, eps: Tensor | None, seed: Seed | None, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check the sources of noise and return it as (eps, None) or as (None, seed), by the rule that docs/noise-and-seeds.md has."""
    if num_samples is None:
        shape = mu.shape
    else:
        checks.samples(num_samples)
        shape = torch.Size((num_samples, *mu.shape))
    checks.noise(eps, seed, generator, shape, mu.device)
    if eps is not None:
        return eps, None
    if seed is not None:
        return None, check_seed(seed, mu.device)
    if mu.device.type == "cuda":
        return None, draw_seed(mu.device, generator)
    # What `randn_like` gave the code before the swap, so that torch.manual_seed reproduces it.
    if num_samples is None and generator is None:
        return torch.randn_like(mu, requires_grad=False), None
    noise = torch.empty_like(mu, requires_grad=False) if num_samples is None else mu.new_empty(shape)
    return noise.normal_(generator=generator), None


def posterior_spread(mu: Tensor, *forms: Any) -> tuple[str, Tensor]:
    """Check mu and its spread, and return the form that is given and the spread."""
    form, spread = one_form("", *forms)
    if spread is None:
        checks.tensor("mu", mu)
        raise TypeError("logvar must be a torch.Tensor, got NoneType, and none of logstd, std and var is given")
    checks.pair("mu", mu, form, spread)
    return form, spread


def one_form(prefix: str, *forms: Any) -> tuple[str, Any]:
    """The name and the value of a spread that is given in at most one form; None where it is not."""
    given = [i for i, value in enumerate(forms) if value is not None]
    if len(given) > 1:
        names = [prefix + form for form in FORMS]
        raise ValueError(f"give one of {', '.join(names)}, got {' and '.join(names[i] for i in given)}")
    return (prefix + FORMS[given[0]], plain(forms[given[0]])) if given else (prefix + FORMS[0], None)


def prior_spread(mu: Tensor, parameter: str, *forms: Any) -> tuple[str, Any]:
    """The name of the prior's spread that is given, and its value in the posterior's form; None where none is."""
    name, value = one_form("prior_", *forms)
    return name, None if value is None else in_form(name, name.removeprefix("prior_"), value, parameter, mu)


def in_form(name: str, form: str, value: Any, to: str, mu: Tensor) -> Any:
    """Check the spread of a prior that is given in one form, and return it in another."""
    checks.spread(name, form, value, mu.device)
    return value if form == to else _converted(value, form, to, mu)


def logvar_of(spread: Tensor, parameter: str, mu: Tensor) -> Tensor:
    """The log-variance of a spread in any form."""
    return spread if parameter == "logvar" else _converted(spread, parameter, "logvar", mu)


def _converted(value: Any, form: str, to: str, mu: Tensor) -> Tensor:
    """A spread in another form."""
    if isinstance(value, NUMBER):
        value = symbolic(value, mu)
    value = value.float() if value.dtype.itemsize < 4 else value
    if {form, to} == {"std", "var"}:
        return value.square() if to == "var" else value.sqrt()
    value = value if form in ("logvar", "logstd") else torch.log(value)
    value = value * ((2.0 if form in ("logstd", "std") else 1.0) / (2.0 if to in ("logstd", "std") else 1.0))
    return value if to in ("logvar", "logstd") else torch.exp(value)


def posterior(
    mu: Tensor, spread: Tensor, prior_mu: Any, prior_spread: tuple[str, Any], weight: Any, name: str = "weight"
) -> LatentInputs:
    """Check what a KL takes, and return it without noise.

    The prior's spread has the name that the user knows it by. The weight has a name of its own beside another one.
    """
    if prior_mu is not None:
        prior_mu = prior("prior_mu", prior_mu, mu)
    prior_name, scale = prior_spread
    if scale is not None:
        scale = prior(prior_name, scale, mu)
    if weight is not None:
        weight = weight_of(name, weight, "mu", mu)
    return LatentInputs(mu, spread, prior_mu, scale, weight)


def kl_of(inputs: LatentInputs, reduction: Reduction, batch_dims: int, logvar_clamp: Any, parameter: str = "logvar") -> KL:
    """Check the options of a KL, and return its record."""
    keep = checks.kept_dims(reduction, batch_dims, inputs.mu.ndim)
    scale = scale_of(reduction, batch_dims, inputs.mu.shape, inputs.weight, inputs[:4])
    if logvar_clamp is not None and parameter != "logvar":
        raise ValueError(f"logvar_clamp is given, but the posterior's spread is {parameter}: only a logvar is clamped")
    return KL(keep, scale, logvar_clamp if logvar_clamp is None else checks.clamp(logvar_clamp), parameter)
