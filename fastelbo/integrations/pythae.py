"""pythae: the losses of VAE, BetaVAE, DisentangledBetaVAE, IWAE and VAMP.

Examples:
    >>> import torch
    >>> from pythae.models import VAE, VAEConfig
    >>> from fastelbo.integrations import pythae
    >>> model = VAE(VAEConfig(input_dim=(1, 8, 8), latent_dim=4, reconstruction_loss="mse"))
    >>> with pythae.patch():
    ...     output = model({"data": torch.rand(16, 1, 8, 8)})
    >>> output.loss.backward()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import elbo_terms, gaussian_nll
from ..latent import gaussian_kl
from ..types import Reduction
from .patching import Patch, check_version, replaced

KNOWN = "0.1.2"

Losses = tuple[Tensor, Tensor, Tensor]  # loss, recon_loss, KLD, each with its gradient


def _terms(model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """(recon_loss, KLD), of each sample or their means. The Gaussian has unit variance and no constant."""
    recon, data = recon_x.reshape(x.shape[0], -1), x.reshape(x.shape[0], -1)
    if model.model_config.reconstruction_loss == "mse":
        return elbo_terms(recon, data, mu, log_var, full=False, reduction=reduction)
    nll = _cross_entropy(recon, data)
    return nll if reduction == "none" else nll.mean(), gaussian_kl(mu, log_var, reduction=reduction)


def _cross_entropy(recon: Tensor, x: Tensor) -> Tensor:
    """pythae's own: its decoders return probabilities, from which a Bernoulli's fused likelihood cannot get the logits back."""
    return F.binary_cross_entropy(recon, x, reduction="none").sum(dim=-1)


def _vae_loss(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Losses:
    recon_loss, kld = _terms(self, recon_x, x, mu, log_var, "batchmean")
    return recon_loss + kld, recon_loss, kld


def _beta_vae_loss(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Losses:
    recon_loss, kld = _terms(self, recon_x, x, mu, log_var, "batchmean")
    return recon_loss + self.beta * kld, recon_loss, kld


def _disentangled_beta_vae_loss(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int
) -> Losses:
    recon_loss, kld = _terms(self, recon_x, x, mu, log_var, "none")
    capacity = self.C * min(epoch / (self.warmup_epoch + 1), 1)
    return (recon_loss + self.beta * torch.abs(kld - capacity)).mean(), recon_loss.mean(), kld.mean()


def _iwae_loss(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Losses:
    """Burda et al. 2016, equation 14: recon_x `(batch, samples, elements)`, mu, log_var and z `(batch, samples, latents)`."""
    data = x.reshape(x.shape[0], 1, -1).expand_as(recon_x)
    if self.model_config.reconstruction_loss == "mse":
        recon_loss = gaussian_nll(recon_x, data, full=False, batch_dims=2)
    else:
        recon_loss = _cross_entropy(recon_x, data)
    # Of both densities of z, the constants cancel.
    kld = 0.5 * (z**2).sum(-1) - gaussian_nll(mu, z, logvar=log_var, full=False, batch_dims=2)
    log_w = -(recon_loss + kld)
    weights = torch.softmax(log_w.detach(), dim=1)
    return -(weights * log_w).sum(1).mean(), recon_loss.mean(), kld.mean()


def _vamp_loss(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int) -> Losses:
    recon, data = recon_x.reshape(x.shape[0], -1), x.reshape(x.shape[0], -1)
    if self.model_config.reconstruction_loss == "mse":
        recon_loss = gaussian_nll(recon, data, full=False, reduction="batchmean")
    else:
        recon_loss = _cross_entropy(recon, data).mean()
    kld = -self._log_p_z(z).mean() - gaussian_nll(mu, z, logvar=log_var, full=False, reduction="batchmean")
    warm_up = epoch / self.linear_scheduling if self.linear_scheduling > 0 else 1.0
    beta = min(warm_up, 1.0) if self.training else 1.0
    return recon_loss + beta * kld, recon_loss, kld


def _vamp_log_p_z(self: Any, z: Tensor) -> Tensor:
    """Tomczak & Welling 2018, equation 9, `(batch,)`: the log-density of a mixture of the pseudo-inputs' posteriors."""
    components = self.number_components
    pseudo_inputs = self.pseudo_inputs(self.idle_input.to(z.device)).reshape(components, *self.model_config.input_dim)
    prior = self.encoder(pseudo_inputs)
    shape = z.shape[0], components, z.shape[1]
    means, at = prior.embedding.expand(shape), z.unsqueeze(1).expand(shape)
    nll = gaussian_nll(means, at, logvar=prior.log_covariance, full=False, batch_dims=2)
    return torch.logsumexp(-nll, dim=1) - torch.log(torch.tensor(components, dtype=torch.float32, device=z.device))


@contextmanager
def _patched() -> Iterator[None]:
    check_version("pythae", KNOWN)
    from pythae.models import IWAE, VAE, VAMP, BetaVAE, DisentangledBetaVAE

    with replaced(
        [
            (VAE, "loss_function", _vae_loss),
            (BetaVAE, "loss_function", _beta_vae_loss),
            (DisentangledBetaVAE, "loss_function", _disentangled_beta_vae_loss),
            (IWAE, "loss_function", _iwae_loss),
            (VAMP, "loss_function", _vamp_loss),
            (VAMP, "_log_p_z", _vamp_log_p_z),
        ]
    ):
        yield


_PATCH = Patch(_patched)


def patch() -> AbstractContextManager[object]:
    """Fuse the `loss_function` of VAE, BetaVAE, DisentangledBetaVAE, IWAE and VAMP, and the latter's prior.

    It returns (loss, recon_loss, KLD) as before, all three with their gradients. With `reconstruction_loss="bce"` the
    reconstruction's term stays pythae's. Subclasses with a `loss_function` of their own keep it.

    Raises:
        ImportError: pythae is not installed, or in a version other than 0.1.2.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Restore pythae's own losses."""
    _PATCH.undo()
