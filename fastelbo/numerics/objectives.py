"""Densities and objectives as `fastelbo compare` compares them: free bits, a balance, a capacity, importance weights.

An objective is no sum of its terms: it is a maximum of them, or the logarithm of a sum of exponentials. Its gradient is a sum, in
which each term counts by its **share**, the objective's derivative in that term. So the truth of a gradient adds up the gradients
of all terms times their shares, and its size adds up their magnitudes. An importance weight is a share that has an error of its
own, and a size for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import densities, estimators, latent, specs
from .oracle import balanced_terms, kl_terms, nll_terms, sample_terms
from .peers import Formulas, Op, Values, arguments_of, sampled
from .tolerance import widened

BITS, CAPACITY, BALANCE = 0.5, 2.0, 0.8
SAMPLES = 3  # of the importance-weighted bounds, whose decoder is the identity


class Term(NamedTuple):
    each: Tensor
    share: Tensor | float = 1.0
    size: Tensor | float = 1.0  # of the share


class Outcome(NamedTuple):
    """One result: its value, its size, and the terms of its gradients."""

    value: Tensor
    size: Tensor
    terms: list[Term]


@dataclass(frozen=True)
class Objective(Op):
    """A function with options of its own, the formula that they stand for, and its results as terms."""

    call: Callable[..., Any]
    formula: Callable[[Formulas, Values], list[Tensor]]
    outcomes: Callable[[Values], list[Outcome]]

    def size(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (SAMPLES, *shape) if self.args[name] == "lz" else shape

    def fused(self, impl: str, v: Values) -> list[Tensor]:
        out = self.call(**v, impl=impl)
        return list(out) if isinstance(out, tuple) else [out]

    def sample(self, impl: Any, v: Values) -> Tensor:
        return latent.reparameterize_kl(v["mu"], v["logvar"], eps=v["eps"], num_samples=SAMPLES, log_prob=True, impl=impl)[0]

    def written(self, formulas: Formulas, v: Values) -> list[Tensor]:
        return self.formula(formulas, v)

    def truth(self, v: Values, ups: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        # Each element has leaves of its own: a size adds up magnitudes before samples share them.
        shape = torch.broadcast_shapes(*(t.shape for t in v.values()))
        wide = {name: widened(t).expand(shape).clone().requires_grad_(name in self.learned) for name, t in v.items()}
        leaves = [wide[name] for name in self.learned]
        slopes, sizes = ([torch.zeros_like(leaf) for leaf in leaves] for _ in range(2))
        found = []
        for outcome, up in zip(self.outcomes(wide), ups, strict=True):
            found.append((outcome.value.detach(), outcome.size.detach()))
            for each, share, size in outcome.terms:
                if not each.requires_grad:
                    continue
                rate = widened(up).reshape(up.shape + (1,) * (each.ndim - up.ndim))
                own = torch.autograd.grad(each.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
                for k, slope in enumerate(own):
                    slopes[k] += slope * rate * share
                    sizes[k] += (slope * rate * size).abs()
        shapes = [v[name].shape for name in self.learned]
        return found + [(a.sum_to_size(s), b.sum_to_size(s)) for a, b, s in zip(slopes, sizes, shapes, strict=True)]


# ---- the formulas ----------------------------------------------------------------------------------------------------------------


def per_sample(each: Tensor) -> Tensor:
    return each.flatten(1).sum(1)


def of_kl(finish: Callable[[Tensor], Tensor], formulas: Formulas, v: Values) -> list[Tensor]:
    return [finish(formulas["kl"](v["mu"], v["logvar"]))]


def with_log_prob(formulas: Formulas, v: Values) -> list[Tensor]:
    z, (mu, logvar) = sampled(v), (v["mu"], v["logvar"])
    return [z, per_sample(formulas["kl"](mu, logvar)), per_sample(formulas["log_prob"](z, mu, logvar))]


def balanced(formulas: Formulas, v: Values) -> list[Tensor]:
    kl, names = formulas["kl/prior"], ("mu", "logvar", "prior_mu", "prior_logvar")
    of_prior = kl(*(v[name].detach() if "prior" not in name else v[name] for name in names))
    of_posterior = kl(*(v[name].detach() if "prior" in name else v[name] for name in names))
    return [per_sample(BALANCE * of_prior + (1 - BALANCE) * of_posterior)]


def estimated_kl(formulas: Formulas, v: Values) -> list[Tensor]:
    log_prob = formulas["log_prob"]
    return [per_sample(log_prob(v["z"], v["mu"], v["logvar"]) - log_prob(v["z"], v["prior_mu"], v["prior_logvar"]))]


def importance_weighted(objective: str, formulas: Formulas, v: Values) -> list[Tensor]:
    """Burda et al. 2016, and as Tucker et al. 2019 change its gradient."""
    z, x, mu, logvar, log_prob = sampled(v), v["x"], v["mu"], v["logvar"], formulas["log_prob"]
    if objective == "dreg":
        mu, logvar = mu.detach(), logvar.detach()
    zero = torch.zeros_like(z)
    each = log_prob(x, z, zero) + log_prob(z, zero, zero) - log_prob(z, mu, logvar)
    log_w = each.flatten(2).sum(2)
    if objective == "dreg" and z.requires_grad:
        share = torch.softmax(log_w.detach(), 0).reshape(log_w.shape + (1,) * (z.ndim - 2))
        z.register_hook(lambda gradient: gradient * share)
    return [(math.log(SAMPLES) - torch.logsumexp(log_w, 0)).mean()]


# ---- the truth -------------------------------------------------------------------------------------------------------------------


def outcome(terms: Sequence[Tensor], keep: int = 1) -> Outcome:
    """The sum of terms over all except the first dimensions."""
    total, size = (sum(t.flatten(keep).sum(-1) if t.ndim > keep else t for t in each) for each in (terms, [t.abs() for t in terms]))
    return Outcome(total, size, [Term(t) for t in terms])  # type: ignore[arg-type]  # of sum's 0


def log_prob_terms(z: Tensor, mu: Tensor, logvar: Tensor, full: bool = True) -> list[Tensor]:
    return [-t for t in nll_terms(specs.NLLInputs(mu, z, logvar, None, None), specs.Likelihood(full=full))]


def terms_of_kl(v: Values) -> list[Tensor]:
    return kl_terms(specs.LatentInputs(v["mu"], v["logvar"]), specs.KL())


def noise_terms(v: Values) -> list[Tensor]:
    """Of log q of a sample, by its noise."""
    return [-0.5 * v["eps"] ** 2, -0.5 * v["logvar"], torch.full_like(v["mu"], -0.5 * math.log(2 * math.pi))]


def log_prob_outcomes(v: Values) -> list[Outcome]:
    inputs = specs.LatentInputs(v["mu"], v["logvar"], eps=v["eps"])
    return [outcome(sample_terms(inputs, specs.KL()), v["mu"].ndim), outcome(terms_of_kl(v)), outcome(noise_terms(v))]


def balanced_outcomes(v: Values) -> list[Outcome]:
    inputs = specs.LatentInputs(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"])
    return [outcome(balanced_terms(inputs, specs.KL(balance=BALANCE)))]


def estimated_outcomes(v: Values) -> list[Outcome]:
    posterior, prior = (log_prob_terms(v["z"], v[f"{of}mu"], v[f"{of}logvar"], full=False) for of in ("", "prior_"))
    return [outcome([*posterior, *(-t for t in prior)])]


def free_outcomes(over: str, v: Values) -> list[Outcome]:
    """Where the KL, or its mean over the batch, is below the bits, these stand for it and nothing has a share."""
    terms = terms_of_kl(v)
    each = torch.stack(terms).sum(0).detach()
    compared = each.mean(0) if over == "batch" else each
    value = compared.clamp(min=BITS)
    value = value.sum() if over == "batch" else per_sample(value)
    share = (compared > BITS).double() / (len(each) if over == "batch" else 1)
    return [Outcome(value, value, [Term(t, share, share) for t in terms])]


def capacity_outcomes(v: Values) -> list[Outcome]:
    whole = outcome(terms_of_kl(v))
    gap = whole.value.detach() - CAPACITY
    sign = gap.sign().reshape(gap.shape + (1,) * (v["mu"].ndim - 1))
    return [Outcome(gap.abs(), whole.size + CAPACITY, [Term(t, sign, sign) for t, *_ in whole.terms])]


def bound_outcomes(objective: str, v: Values) -> list[Outcome]:
    z, doubly = sampled(v), objective == "dreg"
    held = {name: t.detach() for name, t in v.items()}
    log_q = log_prob_terms(z, held["mu"], held["logvar"]) if doubly else noise_terms(v)

    def terms(x: Tensor, z: Tensor, log_q: list[Tensor]) -> list[Tensor]:
        zero = torch.zeros_like(z)
        return [*log_prob_terms(x, z, zero), *log_prob_terms(z, zero, zero), *(-t for t in log_q)]

    whole = outcome([t.detach() for t in terms(v["x"], z, log_q)], 2)  # of each sample
    weights = torch.softmax(whole.value, 0)
    # A weight loses, relative to itself, what its own logarithm loses beside the others, and one that is 1 loses nothing.
    doubt = 1 + (torch.eye(SAMPLES, dtype=weights.dtype, device=weights.device)[:, :, None] - weights).abs().mul(whole.size).sum(1)
    batch = len(v["mu"][0])

    def shared(each: list[Tensor], power: int) -> list[Term]:
        share, size = (t.reshape(t.shape + (1,) * (z.ndim - 2)) for t in (weights**power / batch, weights**power * doubt / batch))
        return [Term(t, -share, size) for t in each]

    value = (math.log(SAMPLES) - torch.logsumexp(whole.value, 0)).mean()
    size = (math.log(SAMPLES) + (weights * whole.size).sum(0)).mean()
    if not doubly:
        return [Outcome(value, size, shared(terms(v["x"], z, log_q), 1))]
    # What comes through z is multiplied by its weight once more; x has no part in that.
    return [Outcome(value, size, shared(terms(v["x"], z.detach(), []), 1) + shared(terms(held["x"], z, log_q), 2))]


# ---- the rows --------------------------------------------------------------------------------------------------------------------


def decoded_by_identity(objective: Any, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor, impl: Any) -> Tensor:
    return estimators.sgvb_loss(lambda z: z, x, mu, logvar, objective=objective, num_samples=SAMPLES, eps=eps, impl=impl)


def free(over: Any, **options: Any) -> Callable[..., Tensor]:
    return partial(latent.gaussian_kl, free_bits=BITS, free_bits_over=over, **options)


ROWS: tuple[tuple[Any, ...], ...] = (
    (
        "reparameterize_kl/log_prob", "mu:z logvar:z eps:z", "z kl log_q", "sample",
        partial(latent.reparameterize_kl, log_prob=True), with_log_prob, log_prob_outcomes,
    ),
    (
        "gaussian_log_prob", "z:z mu:z logvar:z", "log_prob", "sample", densities.gaussian_log_prob,
        lambda formulas, v: [per_sample(formulas["log_prob"](**v))], lambda v: [outcome(log_prob_terms(**v))],
    ),
    (
        "sample_kl", "z:z mu:z logvar:z prior_mu:z prior_logvar:z", "kl", "sample",
        densities.sample_kl, estimated_kl, estimated_outcomes,
    ),
    (
        "gaussian_kl/balance", "mu:z logvar:z prior_mu:z prior_logvar:z", "kl", "sample",
        partial(latent.gaussian_kl, kl_balance=BALANCE), balanced, balanced_outcomes,
    ),
    (
        "gaussian_kl/free_bits", "mu:z logvar:z", "kl", "batchmean", free("batch", reduction="batchmean"),
        partial(of_kl, lambda each: each.mean(0).clamp(min=BITS).sum()), partial(free_outcomes, "batch"),
    ),
    (
        "gaussian_kl/free_bits_over_sample", "mu:z logvar:z", "kl", "sample", free("sample"),
        partial(of_kl, lambda each: per_sample(each.clamp(min=BITS))), partial(free_outcomes, "sample"),
    ),
    (
        "gaussian_kl/capacity", "mu:z logvar:z", "kl", "sample", partial(latent.gaussian_kl, capacity=CAPACITY),
        partial(of_kl, lambda each: (per_sample(each) - CAPACITY).abs()), capacity_outcomes,
    ),
    *(
        (
            f"sgvb_loss/{name}", "x:z mu:z logvar:z eps:lz", "loss", "batchmean",
            partial(decoded_by_identity, name), partial(importance_weighted, name), partial(bound_outcomes, name),
        )
        for name in ("iwae", "dreg")
    ),
)  # fmt: skip
OBJECTIVES = tuple(Objective(name, arguments_of(args), results.split(), *rest) for name, args, results, *rest in ROWS)
