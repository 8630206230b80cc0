"""pythae as it is and patched: outputs and the gradients of all parameters, in real forward and backward passes."""

from __future__ import annotations

import doctest

import pytest
import torch
from agreement import DTYPES, check, gradients
from torch import Tensor

pytest.importorskip("pythae")

from pythae.models import (
    IWAE,
    VAE,
    VAMP,
    BetaVAE,
    BetaVAEConfig,
    DisentangledBetaVAE,
    DisentangledBetaVAEConfig,
    IWAEConfig,
    VAEConfig,
    VAMPConfig,
)
from pythae.models.base.base_utils import ModelOutput

from fastelbo.integrations import pythae as fused

MODELS = {
    "VAE": (VAE, VAEConfig, {}),
    "BetaVAE": (BetaVAE, BetaVAEConfig, {"beta": 4.0}),
    "DisentangledBetaVAE": (DisentangledBetaVAE, DisentangledBetaVAEConfig, {"beta": 3.0, "C": 2.5, "warmup_epoch": 9}),
    "IWAE": (IWAE, IWAEConfig, {"number_samples": 5}),
    "VAMP": (VAMP, VAMPConfig, {"number_components": 6, "linear_scheduling_steps": 8}),
}
GAUSSIAN = {"VAE": {"ElboTerms"}, "BetaVAE": {"ElboTerms"}, "DisentangledBetaVAE": {"ElboTerms"}, "IWAE": {"NLL"}, "VAMP": {"NLL"}}
BERNOULLI = {"VAE": {"Latent"}, "BetaVAE": {"Latent"}, "DisentangledBetaVAE": {"Latent"}, "IWAE": {"NLL"}, "VAMP": {"NLL"}}
TERMS = ("loss", "recon_loss", "reg_loss")


def make(name: str, likelihood: str, dtype: torch.dtype) -> VAE:
    torch.manual_seed(0)
    model, config, options = MODELS[name]
    return model(config(input_dim=(1, 6, 5), latent_dim=3, reconstruction_loss=likelihood, **options)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TERMS)
@pytest.mark.parametrize(("likelihood", "operations"), [("mse", GAUSSIAN), ("bce", BERNOULLI)])
@pytest.mark.parametrize("name", MODELS)
def test_training_step(name: str, likelihood: str, operations: dict[str, set[str]], target: str, dtype: torch.dtype) -> None:
    model = make(name, likelihood, dtype)
    if name == "VAMP":
        model.idle_input = model.idle_input.to(dtype)
    x = torch.rand(7, 1, 6, 5, dtype=dtype)

    def step() -> dict[str, Tensor]:
        output: ModelOutput = model({"data": x}, epoch=4)
        output[target].backward()
        return {**{term: output[term] for term in TERMS}, "recon_x": output.recon_x, "z": output.z, **gradients(model)}

    check(fused, step, operations[name])


@pytest.mark.parametrize("epoch", [0, 30])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["VAMP", "DisentangledBetaVAE"])
def test_schedules(name: str, training: bool, epoch: int) -> None:
    model = make(name, "mse", torch.float32).train(training)
    x = torch.rand(7, 1, 6, 5)
    operations = GAUSSIAN[name]
    check(fused, lambda: {term: model({"data": x}, epoch=epoch)[term] for term in TERMS}, operations)


def test_the_likelihood_that_is_estimated_is_the_same() -> None:
    model = make("VAMP", "mse", torch.float64)
    model.idle_input = model.idle_input.double()
    x = torch.rand(2, 1, 6, 5, dtype=torch.float64)
    check(fused, lambda: {"nll": torch.tensor(model.get_nll(x, n_samples=4, batch_size=4))}, {"NLL"})


def test_subclasses_keep_a_loss_of_their_own_and_inherit_the_fused_one() -> None:
    class Own(VAE):
        def loss_function(self, *args: Tensor) -> str:
            return "own"

    class Inherits(VAE):
        pass

    original = VAE.loss_function
    with fused.patch():
        assert Own.loss_function(None) == "own"
        assert Inherits.loss_function is VAE.loss_function is not original
    assert Inherits.loss_function is VAE.loss_function is original


def test_everything_is_restored() -> None:
    classes = [model for model, *_ in MODELS.values()]
    before = [dict(vars(c)) for c in classes]
    for _ in range(2):
        fused.patch()
        assert [dict(vars(c)) for c in classes] != before
    fused.unpatch()
    assert [dict(vars(c)) for c in classes] == before


def test_example() -> None:
    assert doctest.testmod(fused).failed == 0
    assert doctest.testmod(fused).attempted > 0
