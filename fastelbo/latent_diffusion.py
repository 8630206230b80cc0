"""The loss that latent-diffusion code trains its autoencoders with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import backend, checks
from .dtypes import accumulate_dtype, plain
from .functional import gaussian_nll
from .likelihoods import laplace_nll
from .types import Impl, Number


def _number(name: str, value: Any) -> Any:
    checks.number(name, value, optional=False)
    return plain(value)


class AutoencoderKLLoss(nn.Module):
    """nll + kl_weight * kl with one learned number s: the autoencoders of latent diffusion (Rombach et al. 2022, appendix G).

    What `LPIPSWithDiscriminator` of that paper's code computes, without the discriminator, which stays the caller's.
    With rec = |recon - x| (or its square) + perceptual_weight * perceptual_loss(x, recon), and s the logarithm of a scale (or of
    a variance),

        nll = sum over all elements of (rec / exp(s) + s) / nll_divisor
        kl = sum of the posterior's KL / kl_divisor

    The two divisors are the batch by default. The reconstruction's term is fused: with "l1" it is that of `laplace_nll` of
    logscale s without its constant, with "l2" twice that of `gaussian_nll` of logvar s without its constant.

        loss_fn = fastelbo.AutoencoderKLLoss(perceptual_loss=lpips)
        loss, nll, kl = loss_fn(recon, x, posterior.kl())
        loss = loss + loss_fn.adaptive_weight(nll, g_loss, last_layer) * g_loss

    The only parameter of its own is `logvar`, which has the name that it has in checkpoints of latent-diffusion code.

    Args:
        likelihood: "l1" or "l2", the error rec.
        logvar: Where s starts.
        learn_logvar: Whether s is trained.
        kl_weight: Weight of the KL, a number; an attribute, so that it can be changed between steps.
        perceptual_loss: A function of (x, recon), such as LPIPS, or None. It returns a value for each sample, `(batch, 1, 1, 1)` or
            `(batch,)`, or a map, `(batch, ...)`, whose mean counts. As in latent-diffusion code the value is added to the
            reconstruction error of every element of its sample, and so counts as many times as there are elements.
        perceptual_weight: Weight of the perceptual loss.
        disc_weight: Factor of `adaptive_weight`.
        impl: None or "auto", "triton", "torch", "reference".

    Raises:
        TypeError, ValueError: An argument has the wrong type or value.
    """

    def __init__(
        self,
        *,
        likelihood: Literal["l1", "l2"] = "l1",
        logvar: Number = 0.0,
        learn_logvar: bool = True,
        kl_weight: Number = 1e-6,
        perceptual_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_weight: Number = 1.0,
        disc_weight: Number = 1.0,
        impl: Impl | None = None,
    ) -> None:
        super().__init__()
        if likelihood not in ("l1", "l2"):
            raise ValueError(f"likelihood must be 'l1' or 'l2', got {likelihood!r}")
        if not isinstance(learn_logvar, bool):
            raise TypeError(f"learn_logvar must be a bool, got {type(learn_logvar).__name__}")
        if perceptual_loss is not None and not callable(perceptual_loss):
            raise TypeError(f"perceptual_loss must be a function of (x, recon) or None, got {type(perceptual_loss).__name__}")
        backend.check(impl)
        self.likelihood, self.impl = likelihood, impl
        # On the default device and in the default dtype, as every module's parameters are.
        start = torch.full((), float(_number("logvar", logvar)), dtype=None, device=None)
        self.logvar = nn.Parameter(start, requires_grad=learn_logvar)
        self.kl_weight = _number("kl_weight", kl_weight)
        self.perceptual_loss = perceptual_loss
        self.perceptual_weight = _number("perceptual_weight", perceptual_weight)
        self.disc_weight = _number("disc_weight", disc_weight)

    def forward(
        self,
        recon: Tensor,
        x: Tensor,
        kl: Tensor,
        *,
        weight: Tensor | None = None,
        nll_divisor: Number | None = None,
        kl_divisor: Number | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and its terms.

        Args:
            recon: Reconstructions, `(batch, ...)`. A perceptual loss of images wants the frames of videos as samples.
            x: Data, of recon's shape.
            kl: The posterior's KL, as its `kl()` returns it: of each sample, or not yet summed over all dimensions.
            weight: Weights of the samples' nll in the loss, `(batch,)`; constants. They are factors: the NaN of a sample whose
                weight is 0 stays one.
            nll_divisor, kl_divisor: What the two sums are divided by, such as the number of frames; None is the first dimension
                of recon, and that of kl.

        Returns:
            (loss, nll, kl): loss is nll, with its weights, + kl_weight * kl. nll is without weights, as `adaptive_weight` takes it
            and as it is logged. All three in nats up to the constant, and differentiable.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
        """
        nll = self._nll(recon, x)
        checks.tensor("kl", kl, recon.device)
        if not kl.ndim:
            raise ValueError("kl must have a batch dimension, got a 0-d tensor")
        n = recon.shape[0] if nll_divisor is None else _number("nll_divisor", nll_divisor)
        m = kl.shape[0] if kl_divisor is None else _number("kl_divisor", kl_divisor)
        nll_loss, kl_loss = nll.sum() / n, kl.sum(dtype=accumulate_dtype(kl)) / m
        weighted = nll_loss
        if weight is not None:
            checks.weight("weight", weight, "the batch", recon.shape[:1], recon.device)
            weighted = (weight * nll).sum() / n
        return weighted + self.kl_weight * kl_loss, nll_loss, kl_loss

    def _nll(self, recon: Tensor, x: Tensor) -> Tensor:
        """rec / exp(s) + s, summed over each sample: `(batch,)`."""
        if self.likelihood == "l1":
            nll = laplace_nll(recon, x, logscale=self.logvar, full=False, impl=self.impl)
        else:
            nll = 2 * gaussian_nll(recon, x, logvar=self.logvar, full=False, impl=self.impl)
        if self.perceptual_loss is None:
            return nll
        perceptual = self.perceptual_loss(x, recon)
        if perceptual.ndim < 1 or perceptual.shape[0] != recon.shape[0]:
            raise ValueError(
                f"perceptual_loss must return a value for each of the {recon.shape[0]} samples, "
                f"got shape {checks.shape_of(perceptual)}"
            )
        if perceptual.ndim > 1:
            perceptual = perceptual.flatten(1).mean(1)
        elements = math.prod(recon.shape[1:])
        return nll + self.perceptual_weight * elements * perceptual * torch.exp(-self.logvar)

    def adaptive_weight(self, nll: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
        """The weight of the generator's loss that gives both losses gradients of one size (Esser et al. 2021, equation 7).

        disc_weight * clamp(|d nll / d last_layer| / (|d g_loss / d last_layer| + 1e-4), 0, 10^4), with Euclidean norms.

        Args:
            nll: The second result of a call.
            g_loss: The generator's loss, a 0-d tensor.
            last_layer: The decoder's last weight, on which both depend.

        Returns:
            A 0-d tensor without gradient. The graphs of nll and g_loss stay, for the backward pass that follows.
        """
        norms = []
        for loss in (nll, g_loss):
            (grad,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
            norms.append(torch.linalg.vector_norm(grad, dtype=accumulate_dtype(grad)))
        return self.disc_weight * torch.clamp(norms[0] / (norms[1] + 1e-4), 0.0, 1e4)

    def extra_repr(self) -> str:
        return f"likelihood={self.likelihood!r}, kl_weight={self.kl_weight:g}"
