"""diffusers as it is and patched: posteriors, and the gradients of all parameters of image and video autoencoders."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import DTYPES, check, gradients
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
from diffusers.models.autoencoders import autoencoder_kl, vae

from fastelbo.integrations import diffusers as fused

ORIGINAL = {"class": vae.DiagonalGaussianDistribution}  # a name in a module would be patched, too

NORMS = {"norm_num_groups": 4, "layers_per_block": 1}
VIDEO = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 2, **NORMS}
AUTOENCODERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "AutoencoderKL": (
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            **NORMS,
        },
        (3, 3, 16, 12),
    ),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D",),
            "down_block_out_channels": (8,),
            "up_block_types": ("UpDecoderBlock2D",),
            "up_block_out_channels": (8,),
            "norm_num_groups": 4,
        },
        (2, 3, 8, 8),
    ),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32,), "layers_per_block": 1, "latent_channels": 2},
        (4, 3, 8, 12),
    ),
    "AutoencoderKLCogVideoX": (VIDEO, (2, 3, 9, 16, 24)),
    "AutoencoderKLHunyuanVideo": (VIDEO, (2, 3, 5, 16, 24)),
    "AutoencoderKLWan": ({"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}, (2, 3, 5, 16, 24)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_training_step(name: str, dtype: torch.dtype) -> None:
    options, shape = AUTOENCODERS[name]
    model = getattr(diffusers, name)(**options).to(dtype)
    x = torch.rand(shape, dtype=dtype)
    frames = {"num_frames": 2} if name == "AutoencoderKLTemporalDecoder" else {}

    def step() -> dict[str, Tensor]:
        posterior = model.encode(x).latent_dist
        z = posterior.sample()
        recon = model.decode(z, **frames).sample
        mse, kl = torch.nn.functional.mse_loss(recon, x), posterior.kl()
        loss = mse + 1e-3 * kl.sum() / len(x)
        loss.backward()
        return {"loss": loss, "mse": mse, "kl": kl, "z": z, "recon": recon, **gradients(model)}

    check(fused, step, {"PackedLatent"})


def posterior_step(
    shape: tuple[int, ...], dtype: torch.dtype, call: Callable[[Any, Any, Tensor], Tensor], **options: Any
) -> Callable[[], dict[str, Tensor]]:
    """What `call` makes of two posteriors and a tensor, with all gradients."""
    generator = torch.Generator().manual_seed(1)
    # Some log-variances lie outside the clamp.
    leaves = [(3 * torch.randn(shape, generator=generator, dtype=dtype)) for _ in range(2)]
    leaves[0][0, -1] = -40.0
    leaves.append(torch.randn(shape[0], shape[1] // 2, *shape[2:], generator=generator, dtype=dtype))
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> dict[str, Tensor]:
        one, two = (vae.DiagonalGaussianDistribution(leaf, **options) for leaf in leaves[:2])
        out = call(one, two, leaves[2])
        found = {"out": out}
        if out.requires_grad:
            grads = torch.autograd.grad(out.sum() + out.flatten()[0] / 3, leaves, allow_unused=True)
            found |= {f"gradient {i}": g for i, g in enumerate(grads) if g is not None}
        return found

    return step


CALLS: dict[str, tuple[Callable[[Any, Any, Tensor], Tensor], set[str]]] = {
    "sample": (lambda p, q, x: p.sample(), {"PackedLatent"}),
    "sample of a generator": (lambda p, q, x: p.sample(torch.Generator().manual_seed(5)), {"PackedLatent"}),
    "sample of generators": (
        lambda p, q, x: p.sample([torch.Generator().manual_seed(i) for i in range(len(x))]),
        {"PackedLatent"},
    ),
    "mode": (lambda p, q, x: p.mode(), set()),
    "kl": (lambda p, q, x: p.kl(), {"PackedLatent"}),
    "kl of two": (lambda p, q, x: p.kl(q), {"PackedLatent"}),
    "kl to one that was made before": (lambda p, q, x: p.kl(ORIGINAL["class"](q.parameters)), {"PackedLatent"}),
    "kl to one that broadcasts": (lambda p, q, x: p.kl(type(q)(q.parameters[:1])), set()),
    "nll": (lambda p, q, x: p.nll(x), {"NLL"}),
    "nll over dims": (lambda p, q, x: p.nll(x, dims=(1, 3)), {"NLL"}),
    "nll of what broadcasts": (lambda p, q, x: p.nll(x[:1]), set()),
    "attributes": (lambda p, q, x: torch.stack([p.mean, p.logvar, p.std.log(), p.var.log(), 2 * p.std]), set()),
    "parameters": (lambda p, q, x: p.parameters, set()),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 4, 3, 5, 6)])
@pytest.mark.parametrize("name", CALLS)
def test_posterior(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    call, operations = CALLS[name]
    check(fused, posterior_step(shape, dtype, call), operations)


@pytest.mark.parametrize("name", ["sample", "mode", "kl", "kl of two", "nll", "parameters"])
def test_a_deterministic_posterior_is_its_mean(name: str) -> None:
    check(fused, posterior_step((3, 4, 5, 6), torch.float32, CALLS[name][0], deterministic=True), set())


def test_channels_last() -> None:
    def call(p: Any, q: Any, x: Tensor) -> Tensor:
        return type(p)(p.parameters.contiguous(memory_format=torch.channels_last)).sample()

    check(fused, posterior_step((3, 4, 5, 6), torch.float32, call), {"PackedLatent"})


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5)])
def test_errors_are_those_of_the_original(shape: tuple[int, ...]) -> None:
    moments = torch.randn(shape)
    for _ in range(2):
        with pytest.raises(IndexError, match="Dimension out of range"):
            vae.DiagonalGaussianDistribution(moments).kl()
        fused.patch()
    fused.unpatch()


def test_no_overflow_in_half_precision() -> None:
    """KL(N(0, e^15) || N(0, 1)) is (e^15 - 16) / 2 for each of two elements; float16 ends at 65504."""
    moments = torch.tensor([0.0, 0.0, 15.0, 15.0], dtype=torch.float16).reshape(1, 4, 1, 1)
    with fused.patch():
        kl = vae.DiagonalGaussianDistribution(moments).kl()
    torch.testing.assert_close(kl, torch.tensor([3269001.3725]))


@pytest.mark.parametrize("deterministic", [False, True])
def test_copies_and_pickles(deterministic: bool) -> None:
    with fused.patch():
        posterior = vae.DiagonalGaussianDistribution(torch.randn(2, 4, 3, 3), deterministic)
        pickled, copied = pickle.dumps(posterior), copy.deepcopy(posterior)
        inside = pickle.loads(pickled)
        assert type(copied) is type(inside) is type(posterior)
    outside = pickle.loads(pickled)
    assert type(outside) is ORIGINAL["class"]
    for other in (copied, inside, outside):
        assert other.deterministic is deterministic
        assert torch.equal(other.parameters, posterior.parameters)
        torch.testing.assert_close(other.kl(), posterior.kl())


def test_compiled() -> None:
    def call(p: Any, q: Any, x: Tensor) -> Tensor:
        compiled = torch.compile(
            lambda moments: type(p)(moments).kl() + type(p)(moments).nll(x), fullgraph=True, backend="aot_eager"
        )
        return compiled(p.parameters)

    check(fused, posterior_step((3, 4, 5, 6), torch.float64, call), {"PackedLatent", "NLL"})


def test_it_is_bound_everywhere() -> None:
    consumer = sys.modules[__name__]
    consumer.Alias = vae.DiagonalGaussianDistribution  # type: ignore[attr-defined]
    late = "diffusers.models.autoencoders.autoencoder_kl_magvit"
    held = sys.modules.pop(late)
    try:
        with fused.patch():
            new = vae.DiagonalGaussianDistribution
            assert new is not ORIGINAL["class"]
            assert issubclass(new, ORIGINAL["class"])
            assert autoencoder_kl.DiagonalGaussianDistribution is consumer.Alias is new
            imported = importlib.import_module(late)
            assert imported.DiagonalGaussianDistribution is new
            posterior = new(torch.zeros(1, 2, 1, 1))
        for module in (vae, autoencoder_kl, imported):
            assert module.DiagonalGaussianDistribution is ORIGINAL["class"]
        assert consumer.Alias is ORIGINAL["class"]
        assert isinstance(posterior, ORIGINAL["class"])
        assert posterior.kl().item() == 0  # still works
    finally:
        sys.modules[late] = held
        del consumer.Alias


def test_everything_is_restored() -> None:
    names = [name for name in sys.modules if name.startswith("diffusers")]
    before = {name: dict(vars(sys.modules[name])) for name in names}
    for _ in range(2):
        fused.patch()
        assert vars(vae) != before[vae.__name__]
    fused.unpatch()
    for name in names:
        assert vars(sys.modules[name]) == before[name], name


def test_example() -> None:
    assert doctest.testmod(fused).failed == 0
    assert doctest.testmod(fused).attempted > 0
