"""The records that travel from a public function to a kernel launch: tensors in one, everything else in another.

Every fused op has a record of input tensors (`NLLInputs`, ...), whose first fields may get a gradient (`DIFFERENTIABLE` says how
many), and a frozen record of what is no such tensor (`Likelihood`, ...). Both backends implement an op as two functions:

    forward(inputs, spec, needs) -> (outputs, kept)
        `needs` says for each differentiable input whether a backward pass will ask for its gradient. `kept` is whatever the op
        wants back in that pass (gradients that are ready, for instance), or None.

    backward(inputs, spec, grad_outputs, needs, kept) -> gradients, one for each differentiable input, None where not needed
        `grad_outputs` has a gradient or None for each output. In the first backward pass `kept` is what forward returned, and its
        memory may be used up. In every later pass it is None, and the pass starts from the inputs.

Inputs are never written to. Factors (`scale`, `beta`) are numbers or 0-d tensors on the inputs' device in the dtype of the
arithmetic. They are multiplied with, and never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Factor = float | Tensor
Gradients = tuple[Tensor | None, ...]
Needs = tuple[bool, ...]


COUNTS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")  # families of counts


# ---- everything that is no input tensor ------------------------------------------------------------------------------------------


class Likelihood(NamedTuple):
    """scale * sum of -weight * log p(x; recon, variance), in nats, over all but the first `keep` dimensions."""

    keep: int = 0
    scale: Factor = 1.0
    parameter: str = "logvar"  # what the tensor `variance` holds: "logvar", "std" or "var"
    logvar: float = 0.0  # the log-variance where there is no such tensor
    full: bool = True  # with 1/2 log 2 pi per element
    floor: float = -math.inf  # a "var" below it counts as it; the gradient passes through
    # An x of uint8 counts as x * x_scale + x_shift, see `dtypes.image`. Both are numbers of the dtype of the arithmetic.
    x_scale: float = 1.0
    x_shift: float = 0.0
    # "gaussian"; "laplace", whose `variance` and `logvar` are the logarithm of its scale; or "bernoulli", which has neither.
    # "discretized_logistic" has such a scale, too.
    # Of counts: "poisson"; "negative_binomial" and "zero_inflated_negative_binomial", whose `variance` is the inverse dispersion.
    family: str = "gaussian"
    # Of a "discretized_logistic" only: half a bin, where the first bin ends, where the last begins; numbers as those of an image.
    bin: tuple[float, float, float] | None = None


class KL(NamedTuple):
    """scale * sum of weight * KL(posterior || prior), in nats, over all but the first `keep` dimensions."""

    keep: int = 0
    scale: Factor = 1.0
    clamp: tuple[float, float] | None = None  # of a logvar, with gradient 0 outside
    parameter: str = "logvar"  # what the spreads of posterior and prior are: "logvar", "logstd", "std" or "var"
    # Of the gradients: the prior gets this times its own, and the posterior what is left of 1; None is 1 times for both.
    balance: float | None = None


class Latent(NamedTuple):
    """A sample of the posterior (where the inputs have eps or a seed) and its KL (where it is wanted)."""

    kl: KL = KL()  # its clamp and parameter hold for the sample too
    want_kl: bool = True
    num_samples: int | None = None  # None: z has mu's shape; otherwise (num_samples, *mu.shape)
    want_squares: bool = False  # and the weighted sums of eps^2 that the KL's are, of each sample: a constant


class Elbo(NamedTuple):
    """nll + beta * kl of one decoded sample."""

    likelihood: Likelihood
    kl: KL
    beta: Factor = 1.0
    return_terms: bool = False  # outputs are (loss, nll, kl), and (loss,) otherwise; only the loss has gradients


class Linear(NamedTuple):
    """The likelihood across a linear layer."""

    likelihood: Likelihood
    precision: str | None = None  # of float32 products on a GPU: "ieee", "tf32", "tf32x3"; None is torch's own setting


class LinearElbo(NamedTuple):
    """nll + beta * kl of samples that a linear layer decodes; the nll is summed over the samples (its scale averages)."""

    linear: Linear
    kl: KL
    num_samples: int | None = None
    beta: Factor = 1.0
    return_terms: bool = False


# ---- input tensors ---------------------------------------------------------------------------------------------------------------


class NLLInputs(NamedTuple):
    recon: Tensor  # (batch, ...)
    x: Tensor  # of recon's shape; floating or uint8
    variance: Tensor | None  # broadcasts to recon
    zi_logits: Tensor | None  # of recon's shape: of a zero that the family does not make
    weight: Tensor | None  # bool or floating, broadcasts to recon; where it is 0 the element is absent


class LatentInputs(NamedTuple):
    mu: Tensor  # (batch, ...)
    spread: Tensor  # of mu's shape: what `KL.parameter` says
    prior_mu: Tensor | None = None  # of mu's shape; None is 0
    prior_spread: Tensor | None = None  # of mu's shape; None is a standard deviation of 1
    weight: Tensor | None = None  # of the KL: bool or floating, broadcasts to mu
    eps: Tensor | None = None  # of z's shape
    seed: Tensor | None = None  # 0-d int64; at most one of eps and seed


class ElboInputs(NamedTuple):
    recon: Tensor
    x: Tensor
    variance: Tensor | None
    mu: Tensor
    logvar: Tensor
    prior_mu: Tensor | None
    prior_logvar: Tensor | None
    weight: Tensor | None  # of the likelihood
    kl_weight: Tensor | None = None

    @property
    def nll(self) -> NLLInputs:
        return NLLInputs(self.recon, self.x, self.variance, None, self.weight)

    @property
    def latent(self) -> LatentInputs:
        return LatentInputs(self.mu, self.logvar, self.prior_mu, self.prior_logvar, self.kl_weight)


class LinearInputs(NamedTuple):
    h: Tensor  # (rows, hidden): row n belongs to row n % batch of x
    x: Tensor  # (batch, elements)
    weight: Tensor  # (elements, hidden)
    bias: Tensor | None  # (elements,)
    variance: Tensor | None  # log-variance, of one value or (elements,)


class LinearElboInputs(NamedTuple):
    x: Tensor  # (batch, elements)
    mu: Tensor  # (batch, latents)
    logvar: Tensor
    weight: Tensor  # (elements, latents)
    bias: Tensor | None
    variance: Tensor | None
    prior_mu: Tensor | None
    prior_logvar: Tensor | None
    eps: Tensor | None
    seed: Tensor | None

    @property
    def latent(self) -> LatentInputs:
        return LatentInputs(self.mu, self.logvar, self.prior_mu, self.prior_logvar, None, self.eps, self.seed)

    def linear(self, h: Tensor) -> LinearInputs:
        return LinearInputs(h, self.x, self.weight, self.bias, self.variance)


DIFFERENTIABLE: dict[type[Any], int] = {NLLInputs: 4, LatentInputs: 4, ElboInputs: 7, LinearInputs: 5, LinearElboInputs: 8}


# ---- ops and backends ------------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """A fused op of one backend: the two functions that the head of this file describes."""

    forward: Callable[[Any, Any, Needs], tuple[tuple[Tensor | None, ...], Any]]
    backward: Callable[..., Gradients]


class ListOp(NamedTuple):
    """An op on a list of calls: lists of what an `Op` takes and returns, except for the outputs, which are flat."""

    forward: Callable[[Sequence[LatentInputs], Sequence[Latent], Sequence[Needs]], tuple[Sequence[Tensor | None], Any]]
    backward: Callable[..., Sequence[Gradients]]


class Backend(NamedTuple):
    """Every op, as one backend has it. With each op: its inputs, its record, its outputs."""

    name: str
    likelihood: Op  # NLLInputs, Likelihood -> (nll,)
    latent: Op  # LatentInputs, Latent -> (z or None, kl or None) and the sums of eps^2 if wanted; its backward takes `out` too
    elbo: Op  # ElboInputs, Elbo -> (loss,) or (loss, nll, kl)
    elbo_terms: Op  # ElboInputs, Elbo -> (nll, kl), each with an upstream gradient of its own
    linear_nll: Op  # LinearInputs, Linear -> (nll,)
    linear_elbo: Op  # LinearElboInputs, LinearElbo -> (loss,) or (loss, nll, kl)
    latents: ListOp  # LatentInputs, Latent -> z or None and kl of each call in turn
