# pyright: strict, reportUnknownMemberType=false
"""Every public name in ordinary use. Type checkers read this file (tests/test_types.py), and it runs.

What is unknown of a member is `Tensor.backward`, which torch gives no types.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastelbo

recon, x = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
mu, logvar = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
weight, bias = torch.randn(6, 3), torch.zeros(6)
flag = bool(x.sum() > 0)

assert_type(fastelbo.reparameterize(mu, logvar, 2, seed=np.int64(7)), Tensor)
assert_type(fastelbo.reparameterize_kl(mu, logvar, 0.0, logvar_clamp=(-30.0, None), reduction="sum"), tuple[Tensor, Tensor])
assert_type(fastelbo.gaussian_kl(mu, logvar, prior_logvar=np.float32(0.5), batch_dims=2, impl="torch"), Tensor)
assert_type(fastelbo.gaussian_kl(mu, std=logvar.exp(), prior_std=2.0, reduction="sum"), Tensor)
assert_type(fastelbo.reparameterize(mu, logstd=logvar), Tensor)
assert_type(fastelbo.reparameterize_kl(mu, logvar, log_prob=True), tuple[Tensor, Tensor, Tensor])
assert_type(fastelbo.gaussian_kl(mu, logvar, kl_balance=0.8, free_bits=1, reduction="batchmean", capacity=2.0), Tensor)
assert_type(fastelbo.foreach_gaussian_kl([mu], (logvar,), [mu], reduction="sum"), list[Tensor])
assert_type(fastelbo.foreach_gaussian_kl([mu], logstds=[logvar], prior_vars=[logvar]), list[Tensor])
assert_type(fastelbo.foreach_reparameterize_kl([mu], [logvar], seed=1), tuple[list[Tensor], list[Tensor]])
assert_type(fastelbo.gaussian_log_prob(mu, logvar, std=0.5), Tensor)
assert_type(fastelbo.sample_kl(mu, mu, logvar, prior_std=2, reduction="sum"), Tensor)
normal = torch.distributions.Normal(mu, logvar.exp())
assert_type(fastelbo.kl_divergence(normal, normal), Tensor)
assert_type(fastelbo.gaussian_nll(recon, x, var=0.5, weight=torch.ones(4, 1)), Tensor)
assert_type(fastelbo.gaussian_nll_loss(recon, x, torch.ones(4, 6), reduction="sum"), Tensor)
assert_type(fastelbo.elbo_terms(recon, x, mu, logvar, kl_weight=torch.ones(4, 3)), tuple[Tensor, Tensor])

fastelbo.elbo_loss(recon, x, mu, logvar, beta=0.5, reduction="mean").backward()
fastelbo.elbo_loss(recon, x.byte(), mu, logvar, x_scale=1 / 255, x_shift=0).backward()
assert_type(fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar=nn.Parameter(torch.zeros(()))), Tensor)
loss, nll, kl = fastelbo.elbo_loss(recon, x, mu, logvar, return_terms=True)
assert_type(loss, Tensor)
assert_type(fastelbo.elbo_loss(recon, x, mu, logvar, return_terms=flag), Tensor | tuple[Tensor, Tensor, Tensor])


def decoder(z: Tensor) -> Tensor:
    return z @ weight.T


fastelbo.sgvb_loss(decoder, x, mu, logvar, num_samples=2, seed=1).backward()
fastelbo.sgvb_loss(decoder, x, mu, logvar, objective="iwae", num_samples=2).backward()
assert_type(fastelbo.sgvb_loss(decoder, x, mu, logvar, return_terms=True), tuple[Tensor, Tensor, Tensor])
assert_type(fastelbo.sgvb_loss(decoder, x, mu, logvar, return_terms=flag), Tensor | tuple[Tensor, Tensor, Tensor])
fastelbo.linear_elbo_loss(x, mu, logvar, weight, bias, beta=torch.ones(4), precision="ieee").backward()
assert_type(fastelbo.linear_elbo_loss(x, mu, logvar, weight, return_terms=True), tuple[Tensor, Tensor, Tensor])
assert_type(fastelbo.linear_elbo_loss(x, mu, logvar, weight, return_terms=flag), Tensor | tuple[Tensor, Tensor, Tensor])
assert_type(fastelbo.linear_gaussian_nll(mu, weight, x, logvar=-1), Tensor)
assert_type(fastelbo.laplace_nll(recon, x, logscale=nn.Parameter(torch.zeros(()))), Tensor)
assert_type(fastelbo.bernoulli_nll(recon, x, reduction="batchmean"), Tensor)
assert_type(fastelbo.poisson_nll(recon.exp(), x.round().abs(), full=False), Tensor)
assert_type(fastelbo.negative_binomial_nll(recon.exp(), x.round().abs(), theta=2), Tensor)
assert_type(
    fastelbo.zero_inflated_negative_binomial_nll(recon.exp(), x.round().abs(), theta=torch.ones(6), zi_logits=recon), Tensor
)
assert_type(fastelbo.discretized_logistic_nll(recon, x, logscale=-2, bins=np.int64(32), low=0), Tensor)
fastelbo.elbo_loss(recon, x, mu, logvar, likelihood="laplace", recon_logscale=0.5).backward()
fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar="optimal", nll_scale=0.5, kl_scale=torch.tensor(2), batch_dims=1).backward()
assert_type(fastelbo.effective_beta(1.0, elements=6), float)
assert_type(fastelbo.schedules.cyclical(3, steps=10, cycles=2, rising=0.25, start=0, end=np.float32(2)), float)

posterior = fastelbo.DiagonalGaussian.from_moments(torch.randn(4, 6))
assert_type(posterior, fastelbo.DiagonalGaussian)
assert_type(posterior.rsample_kl(reduction="batchmean"), tuple[Tensor, Tensor])
assert_type(posterior.kl(), Tensor)
assert_type(posterior.nll(posterior.rsample()), Tensor)
assert_type(posterior.log_prob(posterior.sample((2,))), Tensor)
assert_type(posterior.sample(torch.Generator()), Tensor)
assert_type(posterior.entropy(), Tensor)
assert_type(posterior.batch_shape, torch.Size)


def distance(x: Tensor, recon: Tensor) -> Tensor:
    return (x - recon).abs().mean(1)


autoencoder = fastelbo.AutoencoderKLLoss()
assert_type(autoencoder.forward(recon, x, posterior.kl(), weight=torch.ones(4)), tuple[Tensor, Tensor, Tensor])
assert_type(autoencoder.adaptive_weight(recon.square().sum(), recon.sum(), recon), Tensor)
modules = nn.ModuleList(
    [
        fastelbo.AutoencoderKLLoss(likelihood="l2", kl_weight=np.float64(1e-6), perceptual_loss=distance),
        fastelbo.ELBOLoss(beta=0.5, recon_logvar=nn.Parameter(torch.zeros(())), reduction="sum"),
        fastelbo.GaussianNLLLoss(reduction="mean"),
        fastelbo.LinearELBO(3, 6, learned=True),
        fastelbo.Reparameterize(),
    ]
)

with fastelbo.verify(rtol=1e-4) as report:
    fastelbo.gaussian_kl(mu, logvar).sum().backward()
assert_type(report.mismatches, int)
mismatch: type[AssertionError] = fastelbo.NumericsMismatch
comparison = fastelbo.compare("gaussian_kl", shape=(2, 3))
print(len(modules), loss.item() > -1e9, nll.ndim, kl.ndim, mismatch.__name__, comparison.ok)
