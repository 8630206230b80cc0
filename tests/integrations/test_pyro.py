"""pyro as it is and patched: the loss of TraceMeanField_ELBO and the gradients of all parameters."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from agreement import DTYPES, check, gradients
from torch import Tensor, nn

pytest.importorskip("pyro")

import pyro
import pyro.distributions as dist
from pyro.infer import SVI, JitTraceMeanField_ELBO, Trace_ELBO, TraceMeanField_ELBO, trace_mean_field_elbo

from fastelbo.integrations import pyro as fused

BATCH, LATENTS, ELEMENTS = 6, 3, 8


class Autoencoder(nn.Module):
    """A VAE with a Normal likelihood, whose latents and data are events or not."""

    def __init__(self, events: int, learned_prior: bool = False):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(ELEMENTS, 2 * LATENTS), nn.Linear(LATENTS, ELEMENTS)
        self.log_sigma = nn.Parameter(torch.tensor(-0.5))
        self.prior = nn.Parameter(torch.randn(2, LATENTS)) if learned_prior else torch.zeros(2, LATENTS)
        self.events = events

    def normal(self, loc: Tensor, scale: Tensor) -> dist.Distribution:
        return dist.Normal(loc, scale).to_event(1) if self.events else dist.Normal(loc, scale)

    def plates(self, site: str, size: int) -> ExitStack:
        plates = ExitStack()
        plates.enter_context(pyro.plate(f"batch of {site}", BATCH, dim=-1 if self.events else -2))
        if not self.events:
            plates.enter_context(pyro.plate(f"elements of {site}", size, dim=-1))
        return plates

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.poutine.scale(scale=0.5), self.plates("z", LATENTS):
            loc, scale = self.prior[0].to(x.dtype), self.prior[1].to(x.dtype).exp()
            z = pyro.sample("z", self.normal(loc.expand(BATCH, LATENTS), scale.expand(BATCH, LATENTS)))
        with self.plates("x", ELEMENTS):
            pyro.sample("x", self.normal(self.decoder(z), self.log_sigma.exp()), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_sigma = self.encoder(x).chunk(2, -1)
        with pyro.poutine.scale(scale=0.5), self.plates("z", LATENTS):
            pyro.sample("z", self.normal(loc, log_sigma.exp()))


def step_of(vae: Autoencoder, x: Tensor, elbo: Trace_ELBO) -> Callable[[], dict[str, Tensor]]:
    def step() -> dict[str, Tensor]:
        pyro.clear_param_store()
        loss = elbo.loss_and_grads(vae.model, vae.guide, x)
        return {"loss": torch.tensor(loss, dtype=x.dtype), **gradients(vae)}

    return step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learned_prior", [False, True])
@pytest.mark.parametrize("events", [0, 1])
def test_training_step(events: int, learned_prior: bool, dtype: torch.dtype) -> None:
    vae = Autoencoder(events, learned_prior).to(dtype)
    step = step_of(vae, torch.randn(BATCH, ELEMENTS, dtype=dtype), TraceMeanField_ELBO())
    assert len(step()) == 1 + len(list(vae.parameters()))
    check(fused, step, {"Latent", "NLL"} if events else {"Latent"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
def test_particles_in_parallel(elbo: type[Trace_ELBO], dtype: torch.dtype) -> None:
    vae = Autoencoder(1).to(dtype)
    step = step_of(vae, torch.randn(BATCH, ELEMENTS, dtype=dtype), elbo(3, vectorize_particles=True, max_plate_nesting=1))
    check(fused, step, {"Latent", "NLL"} if elbo is TraceMeanField_ELBO else {"NLL"})


def test_svi_takes_the_same_steps() -> None:
    x = torch.randn(BATCH, ELEMENTS, dtype=torch.float64)
    start = Autoencoder(1, learned_prior=True).double().state_dict()

    def step() -> dict[str, Tensor]:
        pyro.clear_param_store()
        vae = Autoencoder(1, learned_prior=True).double()
        vae.load_state_dict(start)
        torch.manual_seed(3)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        losses = [svi.step(x) for _ in range(5)]
        return {"losses": torch.tensor(losses, dtype=torch.float64), **{k: v.clone() for k, v in vae.state_dict().items()}}

    check(fused, step, {"Latent", "NLL"})


@pytest.mark.filterwarnings("ignore")  # what torch.jit.trace says of pyro's own code
def test_a_trace_of_jit_is_pyros_own() -> None:
    vae = Autoencoder(1)
    step = step_of(vae, torch.randn(BATCH, ELEMENTS), JitTraceMeanField_ELBO(ignore_jit_warnings=True))
    step()
    with fused.patch():
        patched = step_of(vae, torch.randn(BATCH, ELEMENTS), JitTraceMeanField_ELBO(ignore_jit_warnings=True))()
    assert patched.keys() == step().keys()


# The distribution of loc and log scale, their shapes, and that of the value.
CASES = {
    "value over samples": (lambda m, s: dist.Normal(m, s.exp()).to_event(1), (4, 3), (3,), (5, 4, 3)),
    "value under the batch": (lambda m, s: dist.Normal(m, s.exp()).to_event(1), (4, 3), (4, 1), (3,)),
    "two event dimensions": (lambda m, s: dist.Normal(m, s.exp()).to_event(2), (4, 3, 2), (), (4, 3, 2)),
    "one loc for all": (lambda m, s: dist.Normal(m, s.exp()).to_event(1), (1,), (3,), (4, 3)),
    "no batch": (lambda m, s: dist.Normal(m, s.exp()).to_event(1), (3,), (), (3,)),
    "of torch": (lambda m, s: dist.Independent(torch.distributions.Normal(m, s.exp()), 1), (4, 3), (1, 3), (4, 3)),
    "expanded": (lambda m, s: dist.Normal(m, s.exp()).to_event(1).expand([4]), (3,), (3,), (4, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_log_prob(case: str) -> None:
    make, *shapes = CASES[case]
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def step() -> dict[str, Tensor]:
        log_prob = make(*leaves[:2]).log_prob(leaves[2])
        upstream = torch.arange(1.0, 1 + log_prob.numel(), dtype=torch.float64).view_as(log_prob)
        grads = torch.autograd.grad(log_prob, leaves, upstream)
        return {"log_prob": log_prob, **{f"gradient {i}": g for i, g in enumerate(grads)}}

    check(fused, step, {"NLL"})


def test_values_are_still_validated() -> None:
    d = dist.Normal(torch.zeros(3), 1.0, validate_args=True).to_event(1)
    with fused.patch(), pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor([0.0, float("nan"), 0.0]))


def test_the_rest_goes_to_pyro() -> None:
    class Scaled(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return 2 * super().log_prob(value)

    x = torch.rand(4, 3)
    normal = dist.Normal(torch.zeros(4, 3), 1.0)
    check(
        fused,
        lambda: {
            "subclass": dist.Independent(Scaled(torch.zeros(4, 3), 1.0), 1).log_prob(x),
            "another density": dist.Laplace(torch.zeros(4, 3), 1.0).to_event(1).log_prob(x),
            "integers": normal.to_event(1).log_prob(x.long()),
            "elements": normal.log_prob(x),
            "another prior": trace_mean_field_elbo.kl_divergence(dist.LogNormal(x, 1.0), dist.LogNormal(0 * x, 2.0)),
            "masked": trace_mean_field_elbo.kl_divergence(normal.mask(x > 0.5), normal.mask(x > 0.5)),
        },
        set(),
    )


def test_everything_is_restored() -> None:
    before = dict(vars(trace_mean_field_elbo)), dict(vars(dist.Independent))
    for _ in range(2):
        fused.patch()
        assert "log_prob" in vars(dist.Independent)
    fused.unpatch()
    assert (dict(vars(trace_mean_field_elbo)), dict(vars(dist.Independent))) == before


def test_example() -> None:
    assert doctest.testmod(fused).failed == 0
    assert doctest.testmod(fused).attempted > 0
