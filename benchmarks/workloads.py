"""What is measured: losses that real models compute, at their sizes, each written three ways.

A workload's functions take its inputs by name and return the loss, or (loss, z) where the decoder would read z. `eager` is the
formula as the cited code (or its family) writes it; `parts` uses torch's own parts: `F.gaussian_nll_loss`, `F.mse_loss` where the
variance is fixed (torch's own part for that, and much the quicker one), and `torch.distributions`; `fused` is fastelbo.

`traffic` is the byte model: (elements, forward, step), where `elements` is how many x or the latents have, whichever are more, and
the others are how many elements a perfect implementation reads and writes. A step is forward and backward. Small inputs (scalars,
per-gene vectors, masks) are left out. `flops` is how many floating-point operations the matrix products of a step take, where the
workload has any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fastelbo

Result = Tensor | tuple[Tensor, Tensor]
Sizes = dict[str, int]


class Draw:
    """Makes a workload's inputs on one device, in one dtype, repeatably."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        values = scale * torch.randn(shape, generator=self.generator)
        return values.to(self.device, self.dtype).requires_grad_(grad)

    def mask(self, lengths: Sequence[int], longest: int) -> Tensor:
        """(batch, 1, longest), true up to each length."""
        return (torch.arange(longest) < torch.tensor(lengths)[:, None]).unsqueeze(1).to(self.device)


@dataclass(frozen=True)
class Workload:
    name: str
    source: str
    full: Sizes
    small: Sizes
    inputs: Callable[..., dict[str, Tensor]]
    eager: Callable[..., Result]
    parts: Callable[..., Result]
    fused: Callable[..., Result]
    traffic: Callable[..., tuple[int, int, int]]
    tiny: Sizes = field(default_factory=dict)
    flops: Callable[..., int] | None = None
    # What a quick run on a small machine changes, where torch.compile takes longer than everything else.
    quick: Sizes = field(default_factory=dict)

    def sizes(self, scale: str) -> Sizes:
        """`full`, `small`, `quick` (small, or less), or `tiny`: nothing but the host's own work is left."""
        if scale == "quick":
            return self.small | self.quick
        return self.full if scale == "full" else self.small if scale == "small" else dict.fromkeys(self.full, 2) | self.tiny


# ---- fixed variance: a pixel decoder ---------------------------------------------------------------------------------------------


def image_inputs(draw: Draw, batch: int, elements: int, latents: int) -> dict[str, Tensor]:
    return {
        "recon": draw(batch, elements), "x": draw(batch, elements, grad=False),
        "mu": draw(batch, latents), "logvar": draw(batch, latents, scale=0.3),
    }  # fmt: skip


def image_eager(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    nll = 0.5 * ((x - recon) ** 2).sum()
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (nll + kl) / x.shape[0]


def image_parts(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    kl = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum()
    return (0.5 * F.mse_loss(recon, x, reduction="sum") + kl) / x.shape[0]


def image_fused(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return fastelbo.elbo_loss(recon, x, mu, logvar, full=False)


def image_traffic(batch: int, elements: int, latents: int) -> tuple[int, int, int]:
    return batch * elements, batch * (2 * elements + 2 * latents), batch * (3 * elements + 4 * latents)


# ---- learned variance ------------------------------------------------------------------------------------------------------------


def learned_inputs(draw: Draw, batch: int, elements: int, latents: int) -> dict[str, Tensor]:
    return image_inputs(draw, batch, elements, latents) | {"recon_logvar": draw(batch, elements, scale=0.3)}


def gene_inputs(draw: Draw, batch: int, elements: int, latents: int) -> dict[str, Tensor]:
    return image_inputs(draw, batch, elements, latents) | {"recon_logvar": draw(elements, scale=0.3)}


def learned_eager(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor) -> Tensor:
    nll = 0.5 * (math.log(2 * math.pi) + recon_logvar + (x - recon) ** 2 / recon_logvar.exp()).sum()
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (nll + kl) / x.shape[0]


def learned_parts(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor) -> Tensor:
    var = recon_logvar.exp().expand_as(recon)
    nll = F.gaussian_nll_loss(recon, x, var, full=True, reduction="sum", eps=1e-12)
    kl = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum()
    return (nll + kl) / x.shape[0]


def learned_fused(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor) -> Tensor:
    return fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar=recon_logvar)


def learned_traffic(batch: int, elements: int, latents: int) -> tuple[int, int, int]:
    return batch * elements, batch * (3 * elements + 2 * latents), batch * (5 * elements + 4 * latents)


# ---- latent diffusion: packed moments, a clamp, one learned scalar ---------------------------------------------------------------

KL_WEIGHT = 1e-6


def packed_inputs(draw: Draw, batch: int, channels: int, latent_channels: int, **space: int) -> dict[str, Tensor]:
    t, h, w = space.get("frames", 0), space["height"], space["width"]
    image = (batch, channels, *([t] if t else []), h, w)
    # The autoencoders cited divide space by 8, and time by 4 after the first frame.
    latent = (batch, 2 * latent_channels, *([1 + (t - 1) // 4] if t else []), -(-h // 8), -(-w // 8))
    own = (latent[0], latent_channels, *latent[2:])
    return {
        "recon": draw(*image), "x": draw(*image, grad=False), "moments": draw(*latent, scale=0.5), "scale": draw(),
        "eps": draw(*own, grad=False), "grad_z": draw(*own, scale=1e-3, grad=False),
    }  # fmt: skip


def noise(eps: Tensor | None, like: Tensor) -> Tensor:
    return torch.randn_like(like) if eps is None else eps


def packed_eager(recon: Tensor, x: Tensor, moments: Tensor, scale: Tensor, eps: Tensor | None) -> Result:
    mean, logvar = torch.chunk(moments, 2, dim=1)
    logvar = torch.clamp(logvar, -30.0, 20.0)
    z = mean + torch.exp(0.5 * logvar) * noise(eps, mean)
    kl = 0.5 * torch.sum(torch.pow(mean, 2) + torch.exp(logvar) - 1.0 - logvar)
    nll = 0.5 * torch.sum((x - recon) ** 2 / torch.exp(scale) + scale)
    return (nll + KL_WEIGHT * kl) / x.shape[0], z


def packed_parts(recon: Tensor, x: Tensor, moments: Tensor, scale: Tensor, eps: Tensor | None) -> Result:
    mean, logvar = torch.chunk(moments, 2, dim=1)
    std = torch.exp(0.5 * torch.clamp(logvar, -30.0, 20.0))
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum()
    nll = F.gaussian_nll_loss(recon, x, scale.exp().expand_as(x), reduction="sum", eps=1e-12)
    return (nll + KL_WEIGHT * kl) / x.shape[0], mean + std * noise(eps, mean)


def packed_fused(recon: Tensor, x: Tensor, moments: Tensor, scale: Tensor, eps: Tensor | None) -> Result:
    z, kl = fastelbo.DiagonalGaussian.from_moments(moments).rsample_kl(eps=eps, reduction="batchmean")
    nll = fastelbo.gaussian_nll(recon, x, logvar=scale, full=False, reduction="batchmean")
    return nll + KL_WEIGHT * kl, z


def packed_traffic(batch: int, channels: int, latent_channels: int, **space: int) -> tuple[int, int, int]:
    t, h, w = space.get("frames", 0), space["height"], space["width"]
    elements = batch * channels * max(t, 1) * h * w
    latents = batch * latent_channels * (1 + (t - 1) // 4 if t else 1) * -(-h // 8) * -(-w // 8)
    # Per latent: mu, logvar in and z out; then mu, logvar and z's gradient in and two gradients out.
    return elements, 2 * elements + 3 * latents, (2 + 3) * elements + 8 * latents


# ---- KL alone: hierarchical, masked, balanced ------------------------------------------------------------------------------------

# Groups of latents at each resolution of the CIFAR-10 model: decoder blocks "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21".
VDVAE_GROUPS = {1: 1, 4: 3, 8: 6, 16: 11, 32: 22}
NAMES = ("mu", "logvar", "prior_mu", "prior_logvar")


def groups_sides(shrink: int, every: int) -> list[int]:
    return [max(1, side // shrink) for side, count in VDVAE_GROUPS.items() for _ in range(count)][::every]


# The project's spreads are logarithms of standard deviations.
GROUP = ("mu", "logstd", "prior_mu", "prior_logstd")


def groups_inputs(draw: Draw, batch: int, channels: int, shrink: int, every: int) -> dict[str, Tensor]:
    sides = groups_sides(shrink, every)
    return {f"{n}{i}": draw(batch, channels, s, s, scale=0.3) for i, s in enumerate(sides) for n in GROUP}


def kl_eager(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    return 0.5 * (prior_logvar - logvar - 1 + (logvar.exp() + (mu - prior_mu) ** 2) / prior_logvar.exp())


def kl_parts(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    return kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(prior_mu, torch.exp(0.5 * prior_logvar)))


def group_eager(mu: Tensor, logstd: Tensor, prior_mu: Tensor, prior_logstd: Tensor) -> Tensor:
    squares = logstd.exp() ** 2 + (mu - prior_mu) ** 2
    return prior_logstd - logstd - 0.5 + 0.5 * squares / prior_logstd.exp() ** 2


def group_parts(mu: Tensor, logstd: Tensor, prior_mu: Tensor, prior_logstd: Tensor) -> Tensor:
    return kl_divergence(Normal(mu, logstd.exp()), Normal(prior_mu, prior_logstd.exp()))


def groups_with(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(**t: Tensor) -> Tensor:
        per_group = [kl(*(t[f"{n}{i}"] for n in GROUP)).sum(dim=(1, 2, 3)) for i in range(len(t) // 4)]
        return torch.stack(per_group).sum(0).mean()

    return loss


def groups_fused(**t: Tensor) -> Tensor:
    lists = {f"{n}s": [t[f"{n}{i}"] for i in range(len(t) // 4)] for n in GROUP}
    return torch.stack(fastelbo.foreach_gaussian_kl(**lists)).sum(0).mean()


def groups_one_by_one(**t: Tensor) -> Tensor:
    per_group = [fastelbo.gaussian_kl(**{n: t[f"{n}{i}"] for n in GROUP}) for i in range(len(t) // 4)]
    return torch.stack(per_group).sum(0).mean()


def groups_traffic(batch: int, channels: int, shrink: int, every: int) -> tuple[int, int, int]:
    latents = batch * channels * sum(side**2 for side in groups_sides(shrink, every))
    return latents, 4 * latents, (4 + 4 + 4) * latents


def masked_inputs(draw: Draw, batch: int, channels: int, frames: int) -> dict[str, Tensor]:
    lengths = [frames - (i * frames) // (2 * batch) for i in range(batch)]
    return {n: draw(batch, channels, frames, scale=0.3) for n in NAMES} | {"mask": draw.mask(lengths, frames)}


def masked_with(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor, mask: Tensor) -> Tensor:
        return torch.sum(kl(mu, logvar, prior_mu, prior_logvar) * mask) / (torch.sum(mask) * mu.shape[1])

    return loss


def masked_fused(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor, mask: Tensor) -> Tensor:
    return fastelbo.gaussian_kl(mu, logvar, prior_mu, prior_logvar, weight=mask, reduction="mean")


def masked_traffic(batch: int, channels: int, frames: int) -> tuple[int, int, int]:
    latents = batch * channels * frames
    return latents, 4 * latents, (4 + 4 + 4) * latents


def balanced_inputs(draw: Draw, batch: int, steps: int, latents: int) -> dict[str, Tensor]:
    return {n: draw(batch, steps, latents, scale=0.3) for n in NAMES}


def balanced_with(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
        dynamics = kl(mu.detach(), logvar.detach(), prior_mu, prior_logvar)
        representation = kl(mu, logvar, prior_mu.detach(), prior_logvar.detach())
        return 0.5 * dynamics.clamp(min=1.0).mean() + 0.1 * representation.clamp(min=1.0).mean()

    return loss


def balanced_fused(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    return balanced_with(lambda *moments: fastelbo.gaussian_kl(*moments, batch_dims=2))(mu, logvar, prior_mu, prior_logvar)


def balanced_traffic(batch: int, steps: int, latents: int) -> tuple[int, int, int]:
    count = batch * steps * latents
    # Twice over: one term for each direction. Each gives two gradients.
    return count, 8 * count, (8 + 8 + 4) * count


# ---- across a linear decoder: the reconstruction is the workload's own -----------------------------------------------------------


def linear_inputs(draw: Draw, batch: int, elements: int, latents: int) -> dict[str, Tensor]:
    return {
        "x": draw(batch, elements, grad=False), "mu": draw(batch, latents), "logvar": draw(batch, latents, scale=0.3),
        "weight": draw(elements, latents, scale=latents**-0.5), "bias": draw(elements), "recon_logvar": draw(elements, scale=0.3),
        "eps": draw(batch, latents, grad=False),
    }  # fmt: skip


def linear_with(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def whole(
        x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor, bias: Tensor, recon_logvar: Tensor, eps: Tensor | None
    ) -> Tensor:
        z = mu + torch.exp(0.5 * logvar) * noise(eps, mu)
        return loss(F.linear(z, weight, bias), x, mu, logvar, recon_logvar)

    return whole


def linear_fused(
    x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor, bias: Tensor, recon_logvar: Tensor, eps: Tensor | None
) -> Tensor:
    return fastelbo.linear_elbo_loss(x, mu, logvar, weight, bias, recon_logvar=recon_logvar, eps=eps)


def linear_traffic(batch: int, elements: int, latents: int) -> tuple[int, int, int]:
    layer, posterior = elements * latents, batch * latents
    return batch * elements, batch * elements + layer + 2 * posterior, batch * elements + 2 * layer + 4 * posterior


def linear_flops(batch: int, elements: int, latents: int) -> int:
    return 3 * 2 * batch * elements * latents  # recon, and the gradients of z and of the weight


def hidden_inputs(draw: Draw, batch: int, elements: int, latents: int) -> dict[str, Tensor]:
    return {
        "h": draw(batch, latents).detach().relu().requires_grad_(), "weight": draw(elements, latents, scale=latents**-0.5),
        "bias": draw(elements), "x": draw(batch, elements, grad=False),
    }  # fmt: skip


def hidden_eager(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return 0.5 * ((x - F.linear(h, weight, bias)) ** 2).sum() / x.shape[0]


def hidden_parts(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(F.linear(h, weight, bias), x, reduction="sum") / x.shape[0]


def hidden_fused(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return fastelbo.linear_gaussian_nll(h, weight, x, bias, full=False, reduction="batchmean")


def hidden_traffic(batch: int, elements: int, latents: int) -> tuple[int, int, int]:
    layer, h = elements * latents, batch * latents
    return batch * elements, batch * elements + layer + h, batch * elements + 2 * layer + 2 * h


def summed(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *moments: kl(*moments).sum(-1)


WORKLOADS = [
    Workload(
        "mnist", "pytorch/examples vae, with a squared error", {"batch": 128, "elements": 784, "latents": 20},
        {"batch": 128, "elements": 784, "latents": 20}, image_inputs, image_eager, image_parts, image_fused, image_traffic,
    ),
    Workload(
        "mnist-logvar", "the same with a log-variance per pixel", {"batch": 128, "elements": 784, "latents": 20},
        {"batch": 128, "elements": 784, "latents": 20}, learned_inputs, learned_eager, learned_parts, learned_fused,
        learned_traffic,
    ),
    Workload(
        "celeba-64", "AntixK/PyTorch-VAE", {"batch": 64, "elements": 12_288, "latents": 128},
        {"batch": 64, "elements": 12_288, "latents": 128}, image_inputs, image_eager, image_parts, image_fused, image_traffic,
    ),
    Workload(
        "celeba-64-logvar", "the same with a log-variance per pixel (ladder-vae, boiler)",
        {"batch": 64, "elements": 12_288, "latents": 128}, {"batch": 64, "elements": 12_288, "latents": 128},
        learned_inputs, learned_eager, learned_parts, learned_fused, learned_traffic,
    ),
    Workload(
        "image-256", "the same at 256 x 256", {"batch": 16, "elements": 196_608, "latents": 4_096},
        {"batch": 16, "elements": 196_608, "latents": 4_096}, image_inputs, image_eager, image_parts, image_fused, image_traffic,
    ),
    Workload(
        "image-256-logvar", "the same with a log-variance per pixel", {"batch": 16, "elements": 196_608, "latents": 4_096},
        {"batch": 16, "elements": 196_608, "latents": 4_096}, learned_inputs, learned_eager, learned_parts, learned_fused,
        learned_traffic,
    ),
    Workload(
        "ldm-kl-f8", "CompVis/latent-diffusion autoencoder, 256 px",
        {"batch": 16, "channels": 3, "latent_channels": 4, "height": 256, "width": 256},
        {"batch": 4, "channels": 3, "latent_channels": 4, "height": 256, "width": 256},
        packed_inputs, packed_eager, packed_parts, packed_fused, packed_traffic, {"height": 8, "width": 8},
    ),
    Workload(
        "video-vae", "Open-Sora-Plan causal video autoencoder, 17 frames",
        {"batch": 1, "channels": 3, "latent_channels": 16, "frames": 17, "height": 256, "width": 256},
        {"batch": 1, "channels": 3, "latent_channels": 16, "frames": 17, "height": 128, "width": 128},
        packed_inputs, packed_eager, packed_parts, packed_fused, packed_traffic, {"frames": 5, "height": 8, "width": 8},
    ),
    Workload(
        "cogvideox", "THUDM/CogVideo autoencoder, 49 frames",
        {"batch": 1, "channels": 3, "latent_channels": 16, "frames": 49, "height": 480, "width": 720},
        {"batch": 1, "channels": 3, "latent_channels": 16, "frames": 49, "height": 120, "width": 184},
        packed_inputs, packed_eager, packed_parts, packed_fused, packed_traffic, {"frames": 5, "height": 8, "width": 8},
    ),
    Workload(
        "vdvae-cifar", "openai/vdvae, 43 groups of latents with a learned prior",
        {"batch": 16, "channels": 16, "shrink": 1, "every": 1}, {"batch": 2, "channels": 16, "shrink": 1, "every": 1},
        groups_inputs, groups_with(group_eager), groups_with(group_parts), groups_fused, groups_traffic, {"shrink": 32, "every": 1},
        quick={"every": 8},
    ),
    Workload(
        "vits", "jaywalnut310/vits, the analytical KL between two masked sequences", {"batch": 64, "channels": 192, "frames": 570},
        {"batch": 8, "channels": 192, "frames": 570}, masked_inputs, masked_with(kl_eager), masked_with(kl_parts), masked_fused,
        masked_traffic,
    ),
    Workload(
        "rssm", "danijar/dreamer, KL balancing with free nats", {"batch": 16, "steps": 64, "latents": 32},
        {"batch": 16, "steps": 64, "latents": 32}, balanced_inputs, balanced_with(summed(kl_eager)),
        balanced_with(summed(kl_parts)), balanced_fused, balanced_traffic,
    ),
    Workload(
        "single-cell", "scverse/scvi-tools, normal likelihood with a variance per gene",
        {"batch": 128, "elements": 2_000, "latents": 10}, {"batch": 128, "elements": 2_000, "latents": 10},
        gene_inputs, learned_eager, learned_parts, learned_fused, image_traffic,
    ),
    Workload(
        "single-cell-linear", "scverse/scvi-tools linearly decoded VAE, all genes",
        {"batch": 4096, "elements": 30_000, "latents": 32}, {"batch": 512, "elements": 10_000, "latents": 32},
        linear_inputs, linear_with(learned_eager), linear_with(learned_parts), linear_fused, linear_traffic, flops=linear_flops,
    ),
    Workload(
        "mlp-last-layer", "pytorch/examples vae's last layer, 400 to 784, with a squared error",
        {"batch": 4096, "elements": 784, "latents": 400}, {"batch": 512, "elements": 784, "latents": 400},
        hidden_inputs, hidden_eager, hidden_parts, hidden_fused, hidden_traffic, flops=linear_flops,
    ),
]  # fmt: skip
