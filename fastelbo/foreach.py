"""The KL, and samples with it, of a list of posteriors at once, as the groups of latents of a hierarchical VAE.

A hierarchy has dozens of small KLs, and what they cost is the host's work. A list is one node of autograd's graph, and on a GPU its
elements share launches. The results are those of the single calls, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, autograd, backend, checks
from .latent import reparameterised
from .noise import check_seed, draw_seed
from .specs import Latent, LatentInputs
from .tracing import are_wrapped, is_transformed, one_node
from .types import Impl, Reduction, Seed

# 2^64 over the golden ratio: seeds of two lists that are counted up one by one do not meet.
SEED_STEP = 0x9E3779B97F4A7C15

Tensors = Sequence[Tensor]


@one_node
def foreach_gaussian_kl(
    mus: Tensors,
    logvars: Tensors | None = None,
    prior_mus: Tensors | None = None,
    prior_logvars: Tensors | None = None,
    *,
    logstds: Tensors | None = None,
    stds: Tensors | None = None,
    vars: Tensors | None = None,
    prior_logstds: Tensors | None = None,
    prior_stds: Tensors | None = None,
    prior_vars: Tensors | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> list[Tensor]:
    """`gaussian_kl` of each element of lists, whose shapes and dtypes may differ: [KL(N(mus[i], exp(logvars[i])) || prior i)].

    The values and gradients are those of the single calls, bit for bit, at a fraction of their host time.

    Args:
        mus: Means of the posteriors, of any floating dtype, on one device.
        logvars, logstds, stds, vars: Their spreads, in exactly one of four forms, each of its mu's shape.
        prior_mus: Means of the priors, each a number or a tensor that broadcasts to its mu; None is 0.
        prior_logvars, prior_logstds, prior_stds, prior_vars: Their spreads, likewise, in at most one form; with none the priors
            have unit variance. Those in another form than the posteriors' are converted first.
        reduction, batch_dims: Of each element, as in `gaussian_kl`.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The KLs in nats, differentiable in every tensor, twice.

    Raises:
        TypeError, ValueError: A list is no list or tuple or has another length than mus, or an element has the wrong type, dtype,
            shape or device: the message names it, as in "logvars[3]".
    """
    prior = prior_logvars, prior_logstds, prior_stds, prior_vars
    inputs, specs = _checked(mus, (logvars, logstds, stds, vars), prior_mus, prior, reduction, batch_dims)
    return [kl for _, kl in _results(inputs, specs, impl)]


@one_node
def foreach_reparameterize_kl(
    mus: Tensors,
    logvars: Tensors | None = None,
    prior_mus: Tensors | None = None,
    prior_logvars: Tensors | None = None,
    *,
    logstds: Tensors | None = None,
    stds: Tensors | None = None,
    vars: Tensors | None = None,
    prior_logstds: Tensors | None = None,
    prior_stds: Tensors | None = None,
    prior_vars: Tensors | None = None,
    eps: Tensors | None = None,
    seed: Seed | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """`reparameterize_kl` of each element of lists, whose shapes and dtypes may differ.

    The values and gradients are those of the single calls, bit for bit, at a fraction of their host time.

    Args:
        mus, logvars, logstds, stds, vars: The posteriors, as in `foreach_gaussian_kl`.
        prior_mus, prior_logvars, prior_logstds, prior_stds, prior_vars: The priors, likewise.
        reduction, batch_dims, impl: As there.
        eps: The noise of each element, of its mu's shape; constants.
        seed: An int or a 0-d int64 tensor on the device of the mus. Element i has the noise of `reparameterize_kl` with the seed
            `(seed + i * 0x9E3779B97F4A7C15) % 2**64`.
        generator: Source of the noise, or on a GPU of a fresh seed for the list. At most one of eps, seed and generator may be
            given. With none, the CPU draws what `torch.randn_like` of each mu in turn would.

    Returns:
        (zs, kls): samples in their mu's dtype, and KLs in nats; differentiable in the posteriors, the KLs in the priors too, twice.

    Raises:
        TypeError, ValueError: As `foreach_gaussian_kl`, or two sources of noise are given.
    """
    prior = prior_logvars, prior_logstds, prior_stds, prior_vars
    inputs, specs = _checked(mus, (logvars, logstds, stds, vars), prior_mus, prior, reduction, batch_dims)
    found = _results(_with_noise(inputs, eps, seed, generator), specs, impl)
    return [z for z, _ in found], [kl for _, kl in found]


def _checked(
    mus: Any, posterior: Sequence[Any], prior_mus: Any, prior: Sequence[Any], reduction: Reduction, batch_dims: int
) -> tuple[list[LatentInputs], list[Latent]]:
    """The inputs of each element, without noise, and the record of each."""
    _list_of("mus", mus, mus)
    parameter, spreads = _one_form("", posterior)
    prior_form, prior_spreads = _one_form("prior_", prior)
    if spreads is None:
        raise TypeError("logvars must be a list or tuple of tensors, got NoneType, and none of logstds, stds and vars is given")
    name, prior_name = f"{parameter}s", f"prior_{prior_form}s"
    for of_list, values in ((name, spreads), ("prior_mus", prior_mus), (prior_name, prior_spreads)):
        if values is not None:
            _list_of(of_list, values, mus)
    inputs = []
    for i, (mu, spread) in enumerate(zip(mus, spreads, strict=True)):
        checks.pair(f"mus[{i}]", mu, f"{name}[{i}]", spread, mus[0].device if i else None)
        prior_mu = prior_spread = None
        if prior_mus is not None:
            prior_mu = arguments.prior(f"prior_mus[{i}]", prior_mus[i], mu)
        if prior_spreads is not None:
            of_one = f"{prior_name}[{i}]"
            prior_spread = arguments.prior(of_one, arguments.in_form(of_one, prior_form, prior_spreads[i], parameter, mu), mu)
        inputs.append(LatentInputs(mu, spread, prior_mu, prior_spread))
    return inputs, [Latent(arguments.kl_of(own, reduction, batch_dims, None, parameter)) for own in inputs]


def _one_form(prefix: str, lists: Sequence[Any]) -> tuple[str, Any]:
    """The form of the spreads, and the list that is given, if one is."""
    given = [form for form, values in zip(arguments.FORMS, lists, strict=True) if values is not None]
    if len(given) > 1:
        names, got = ([f"{prefix}{form}s" for form in forms] for forms in (arguments.FORMS, given))
        raise ValueError(f"give one of {', '.join(names)}, got {' and '.join(got)}")
    form = given[0] if given else arguments.FORMS[0]
    return form, lists[arguments.FORMS.index(form)]


def _list_of(name: str, tensors: Any, mus: Any) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(tensors).__name__}")
    if len(tensors) != len(mus):
        raise ValueError(f"{name} has {len(tensors)} elements, but mus has {len(mus)}: they must be equally many")


def _with_noise(inputs: list[LatentInputs], eps: Any, seed: Any, generator: Any) -> list[LatentInputs]:
    checks.one_source(eps, seed, generator)
    if eps is not None:
        _list_of("eps", eps, inputs)
    if not inputs:
        return inputs
    device = inputs[0].mu.device
    if eps is not None:
        for i, (own, noise) in enumerate(zip(inputs, eps, strict=True)):
            checks.given_noise(f"eps[{i}]", noise, own.mu.shape, device)
        return [own._replace(eps=noise) for own, noise in zip(inputs, eps, strict=True)]
    if seed is None and device.type != "cuda":
        return [own._replace(eps=arguments.noise(own.mu, None, None, None, generator)[0]) for own in inputs]
    first = draw_seed(device, generator) if seed is None else check_seed(seed, device)
    steps = torch.arange(len(inputs), dtype=torch.int64, device=device) * (SEED_STEP - 2**64)
    return [own._replace(seed=each) for own, each in zip(inputs, (first + steps).unbind(), strict=True)]


def _results(inputs: list[LatentInputs], specs: list[Latent], impl: Impl | None) -> list[Any]:
    """(z or None, kl) of each element of checked inputs."""
    if _are_ordinary(inputs):
        chosen = backend.choose(impl, inputs[0].mu.device)
        if chosen is not None:
            outputs = autograd.call_list(chosen, specs, inputs)
            return list(zip(outputs[::2], outputs[1::2], strict=True))
    return [reparameterised(*each, impl)[:2] for each in zip(inputs, specs, strict=True)]


def _are_ordinary(inputs: list[LatentInputs]) -> bool:
    """Whether there is something to share: whoever looks on (a trace, a transform, `verify`) is shown single calls."""
    if torch.compiler.is_compiling() or backend.watcher is not None or is_transformed():
        return False
    if 0 in [own.mu.numel() for own in inputs] or are_wrapped([t for own in inputs for t in own]):
        return False
    return bool(inputs)
