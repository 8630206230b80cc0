"""What the public functions take, for type checkers and for readers of their signatures."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import numpy as np
from torch import Generator, Tensor

Reduction = Literal["none", "batchmean", "sum", "mean"]
Impl = Literal["auto", "triton", "torch", "reference"]
Family = Literal["gaussian", "laplace", "bernoulli"]
Objective = Literal["elbo", "iwae", "dreg"]
FreeBitsOver = Literal["batch", "sample"]
CountFamily = Literal["poisson", "negative_binomial", "zero_inflated_negative_binomial"]
Precision = Literal["ieee", "tf32", "tf32x3"]

Int = int | np.integer[Any]
Number = float | Int | np.floating[Any]
Seed = Int | Tensor
Clamp = tuple[Number | None, Number | None]


class KLOptions(TypedDict, total=False):
    """The keywords of `reparameterize_kl`, except the one that decides what it returns."""

    logstd: Tensor | None
    std: Tensor | None
    var: Tensor | None
    prior_logstd: Tensor | Number | None
    prior_std: Tensor | Number | None
    prior_var: Tensor | Number | None
    num_samples: Int | None
    eps: Tensor | None
    seed: Seed | None
    generator: Generator | None
    logvar_clamp: Clamp | None
    weight: Tensor | None
    kl_balance: Number | None
    free_bits: Number | None
    free_bits_over: FreeBitsOver
    capacity: Number | None
    reduction: Reduction
    batch_dims: int
    impl: Impl | None


class _LossOptions(TypedDict, total=False):
    prior_mu: Tensor | Number | None
    prior_logvar: Tensor | Number | None
    beta: Tensor | Number
    full: bool
    reduction: Reduction
    impl: Impl | None


class _NoiseOptions(TypedDict, total=False):
    eps: Tensor | None
    seed: Seed | None
    generator: Generator | None


class _DecodedOptions(_LossOptions, total=False):
    likelihood: Family
    recon_logvar: Tensor | Number | Literal["optimal"] | None
    recon_logscale: Tensor | Number | None
    logvar_clamp: Clamp | None
    weight: Tensor | None
    kl_weight: Tensor | None
    x_scale: Number | None
    x_shift: Number | None


class ElboOptions(_DecodedOptions, total=False):
    """The keywords of `elbo_loss`, except the one that decides what it returns."""

    nll_scale: Tensor | Number | None
    kl_scale: Tensor | Number | None
    batch_dims: int


class SgvbOptions(_DecodedOptions, _NoiseOptions, total=False):
    """As `ElboOptions` of `sgvb_loss`."""

    objective: Objective
    num_samples: Int


class LinearElboOptions(_LossOptions, _NoiseOptions, total=False):
    """As `ElboOptions` of `linear_elbo_loss`."""

    recon_logvar: Tensor | Number | None
    num_samples: Int | None
    precision: Precision | None
