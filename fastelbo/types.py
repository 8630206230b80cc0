"""What the public functions take, for type checkers and for readers of their signatures."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import numpy as np
from torch import Generator, Tensor

Reduction = Literal["none", "batchmean", "sum", "mean"]
Impl = Literal["auto", "triton", "torch", "reference"]
Family = Literal["gaussian", "laplace", "bernoulli"]
CountFamily = Literal["poisson", "negative_binomial", "zero_inflated_negative_binomial"]
Precision = Literal["ieee", "tf32", "tf32x3"]

Int = int | np.integer[Any]
Number = float | Int | np.floating[Any]
Seed = Int | Tensor
Clamp = tuple[Number | None, Number | None]


class _LossOptions(TypedDict, total=False):
    recon_logvar: Tensor | Number | None
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


class ElboOptions(_LossOptions, total=False):
    """The keywords of `elbo_loss`, except the one that decides what it returns."""

    likelihood: Family
    recon_logscale: Tensor | Number | None
    logvar_clamp: Clamp | None
    weight: Tensor | None
    kl_weight: Tensor | None
    x_scale: Number | None
    x_shift: Number | None


class SgvbOptions(ElboOptions, _NoiseOptions, total=False):
    """As `ElboOptions` of `sgvb_loss`."""

    num_samples: Int


class LinearElboOptions(_LossOptions, _NoiseOptions, total=False):
    """As `ElboOptions` of `linear_elbo_loss`."""

    num_samples: Int | None
    precision: Precision | None
