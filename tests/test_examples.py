"""The examples, with fewer steps than by default: each finds what it should, and its exit status says when it does not."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch.distributions import Bernoulli, Normal, kl_divergence

import fastelbo
from examples import conv_vae, hierarchical_vae, iwae, linear_vae

LATENTS = 3
# Enough for three latents; the example's own default is for ten.
STEPS = 300


def digits() -> Tensor:
    return torch.tensor(load_digits().data, dtype=torch.float32)


def run(folder: Path, *options: str) -> int:
    """The example's exit status."""
    return linear_vae.main(["--latents", str(LATENTS), "--steps", str(STEPS), "--plot", str(folder / "new/plot.png"), *options])


def gaussian_log_likelihood(x: Any, mean: Any, covariance: Any) -> float:
    """Nats per row of x, by numpy alone."""
    distance = ((x - mean) * np.linalg.solve(covariance, (x - mean).T).T).sum(1)
    return -0.5 * float((x.shape[1] * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] + distance).mean())


def optimum(x: Any, latents: int) -> tuple[float, float, Any]:
    """The log-likelihood, sigma^2 and subspace of probabilistic PCA, from the density of the model and not from its closed form."""
    _, singular, directions = np.linalg.svd(x - x.mean(0), full_matrices=False)
    eigenvalues = singular**2 / len(x)
    variance = eigenvalues[latents:].mean()
    first = directions[:latents]
    covariance = (first.T * (eigenvalues[:latents] - variance)) @ first + variance * np.eye(x.shape[1])
    return gaussian_log_likelihood(x, x.mean(0), covariance), float(variance), first.T


def test_finds_the_optimum(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    train = linear_vae.train
    monkeypatch.setattr(linear_vae, "train", lambda *args, **kwargs: runs.append(train(*args, **kwargs)) or runs[-1])
    monkeypatch.setenv("COLUMNS", "100")
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert run(tmp_path) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "new/plot.png").read_bytes()[:4] == b"\x89PNG"

    x = digits().double().numpy()
    log_likelihood, variance, subspace = optimum(x, LATENTS)
    model = runs[0].model.cpu().double()
    weight, bias = (p.detach().numpy() for p in (model.decoder.weight, model.decoder.bias))
    learned = math.exp(model.recon_logvar.item())
    found = gaussian_log_likelihood(x, bias, weight @ weight.T + learned * np.eye(len(weight)))
    # No parameters beat the optimum, and the training comes far closer than the 1% that it promises.
    assert log_likelihood - 1e-3 * abs(log_likelihood) < found < log_likelihood
    assert learned == pytest.approx(variance, rel=1e-2)
    assert len(runs[0].elbos) == STEPS
    assert runs[0].elbo == pytest.approx(log_likelihood, rel=1e-2)
    assert np.linalg.svd(np.linalg.qr(weight)[0].T @ subspace)[1].min() > math.cos(math.radians(1))

    # What is printed is what was found.
    out = capsys.readouterr().out
    rows = {name: (float(a), float(b)) for name, a, b in re.findall(r"^ *(\S.*?)  +(-?[\d.]+) +(-?[\d.]+) +[\d.]+% *$", out, re.M)}
    assert list(rows) == [
        "log-likelihood, nats per digit",
        "ELBO, exact",
        "ELBO, linear_elbo_loss, 100 samples",
        "sigma^2",
    ]
    assert rows["log-likelihood, nats per digit"] == pytest.approx((found, log_likelihood), abs=1e-3)
    assert rows["sigma^2"] == pytest.approx((learned, variance), abs=1e-3)
    assert rows["ELBO, exact"][0] < rows["log-likelihood, nats per digit"][0]
    assert "everything agrees within 1%" in out


@pytest.mark.parametrize("latents", [1, 10, 60])
def test_closed_form(latents: int) -> None:
    log_likelihood, variance, subspace = optimum(digits().double().numpy(), latents)
    found = linear_vae.closed_form(digits(), latents)
    assert found.log_likelihood == pytest.approx(log_likelihood, rel=1e-9)
    assert found.variance == pytest.approx(variance, rel=1e-9)
    assert linear_vae.largest_angle(found.subspace, torch.from_numpy(subspace.copy())) < 1e-3


def test_exact_elbo() -> None:
    """At random parameters, against what the function samples; and the log-likelihood against numpy's."""
    x = digits()
    model = linear_vae.LinearVAE(x, LATENTS)
    learned = linear_vae.evaluate(model, x)
    assert model.decoder.weight.dtype == torch.float32
    with torch.no_grad():
        sampled = -model.double().loss(x.double(), 100, seed=1).item()
    assert learned.elbo == pytest.approx(sampled, rel=1e-4)
    assert learned.elbo < learned.log_likelihood
    weight, bias = (p.detach().numpy() for p in (model.decoder.weight, model.decoder.bias))
    covariance = weight @ weight.T + model.recon_logvar.exp().item() * np.eye(len(weight))
    assert learned.log_likelihood == pytest.approx(gaussian_log_likelihood(x.double().numpy(), bias, covariance), rel=1e-9)


def test_too_few_steps_are_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--steps", "1") == 1
    assert "Off by more than 1%: log-likelihood, ELBO, sigma^2." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "missed"),
    [
        ({"beta": 2.0}, "ELBO, sigma^2"),  # gradients of another objective
        ({"full": False}, "ELBO"),  # right gradients of a loss that lacks its constant
    ],
)
def test_a_wrong_loss_is_an_exit_status(
    wrong: dict[str, Any], missed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fastelbo.linear_elbo_loss
    monkeypatch.setattr(fastelbo, "linear_elbo_loss", lambda *args, **kwargs: right(*args, **kwargs, **wrong))
    assert run(tmp_path) == 1
    assert f"Off by more than 1%: {missed}." in capsys.readouterr().out


def test_nan_is_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastelbo.linear_elbo_loss
    monkeypatch.setattr(fastelbo, "linear_elbo_loss", lambda *args, **kwargs: right(*args, **kwargs) * math.nan)
    assert run(tmp_path) == 1
    assert "The training failed: the ELBO is nan at step 1." in capsys.readouterr().out


def test_a_seed_gives_the_same_run() -> None:
    runs = [linear_vae.train(digits(), LATENTS, 3, seed).elbos for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert abs(runs[0][0] - runs[2][0]) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--latents", "0"], "latents must be from 1 to 60 for data of rank 61, got 0"),
        (["--latents", "61"], "latents must be from 1 to 60 for data of rank 61, got 61"),
        (["--impl", "numpy"], "invalid choice: 'numpy'"),
    ],
)
def test_bad_arguments(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *options)
    assert message in capsys.readouterr().err


# ---- the convolutional VAE -------------------------------------------------------------------------------------------------------


def recorded(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the module's `train` returns from now on."""
    runs: list[Any] = []
    train = module.train
    monkeypatch.setattr(module, "train", lambda *args, **kwargs: runs.append(train(*args, **kwargs)) or runs[-1])
    monkeypatch.setenv("COLUMNS", "120")
    return runs


def independent_pixels(train: Any, held_out: Any, likelihood: str) -> float:
    """Nats per held-out image of pixels that are independent, by numpy alone."""
    if likelihood == "bernoulli":
        p = (train.sum(0) + 0.5) / (len(train) + 1)
        return -float((held_out * np.log(p) + (1 - held_out) * np.log(1 - p)).sum()) / len(held_out)
    variance = ((train - train.mean(0)) ** 2).mean()
    squares = ((held_out - train.mean(0)) ** 2).sum() / len(held_out)
    return 0.5 * (squares / variance + train[0].size * math.log(2 * math.pi * variance))


@pytest.mark.parametrize(("data", "epochs"), [("digits", 6), ("patches", 4)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_conv_vae(
    data: str, epochs: int, likelihood: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = recorded(conv_vae, monkeypatch)
    plot = tmp_path / "new/plot.png"
    options = ["--data", data, "--likelihood", likelihood, "--epochs", str(epochs), "--plot", str(plot)]
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert conv_vae.main(options) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert plot.read_bytes()[:4] == b"\x89PNG"

    (run,) = runs
    assert len(run.losses) == epochs
    assert run.losses[-1] < run.losses[0]
    assert run.images.train.dtype == torch.uint8
    steps = 1 if likelihood == "bernoulli" else {"digits": 16, "patches": 255}[data]
    assert int(run.images.train.max()) == steps
    pixels = [images.cpu().double().numpy() / steps for images in (run.images.train, run.images.held_out)]
    assert run.baseline == pytest.approx(independent_pixels(*pixels, likelihood), rel=1e-4)
    assert run.nats < run.baseline

    if likelihood == "gaussian":
        assert run.model.recon_logvar.item() < -2.5  # learned: it starts at -2
    bits = run.nats / pixels[0][0].size / math.log(2) + math.log2(steps)
    row = re.search(rf"^ *{data} +{likelihood} +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+)", capsys.readouterr().out, re.M)
    assert row is not None
    assert [float(number) for number in row.groups()] == pytest.approx([run.nats, run.baseline, bits], abs=6e-3)


def test_conv_vae_images() -> None:
    """Every patch of the photographs is there once, as it lies."""
    images = conv_vae.load("patches", torch.Generator().manual_seed(3))
    patches = torch.cat([images.train, images.held_out])
    assert len(images.held_out) == len(patches) // 5
    found = {patch.numpy().tobytes() for patch in patches.cpu()}
    for photograph in load_sample_images().images:
        for y in range(0, photograph.shape[0] - 15, 16):
            for x in range(0, photograph.shape[1] - 15, 16):
                assert photograph[y : y + 16, x : x + 16].transpose(2, 0, 1).tobytes() in found
    assert len(patches) == 2 * (427 // 16) * (640 // 16)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_conv_vae_loss(likelihood: str) -> None:
    images = conv_vae.load("digits", torch.Generator().manual_seed(0))
    images = images.black_and_white() if likelihood == "bernoulli" else images
    model, x = conv_vae.ConvVAE(images, likelihood).to(conv_vae.DEVICE), images.train[:9]
    mu, logvar = model.posterior(x)
    q = Normal(mu, torch.exp(logvar / 2))
    recon = model.decoder(fastelbo.reparameterize(mu, logvar, seed=1))
    data = x / images.steps
    p = Bernoulli(logits=recon) if likelihood == "bernoulli" else Normal(recon, torch.exp(model.recon_logvar / 2))
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    expected = (kl - p.log_prob(data).sum((1, 2, 3))).mean()
    torch.testing.assert_close(model.loss(x, 1, seed=1), expected, rtol=1e-5, atol=0)


def test_conv_vae_worse_than_its_baseline_is_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "digits", "--likelihood", "bernoulli", "--epochs", "1", "--plot", str(tmp_path / "plot.png")]
    assert conv_vae.main(options) == 1
    assert "Not better than the baseline: digits, bernoulli." in capsys.readouterr().out


# ---- the hierarchical VAE --------------------------------------------------------------------------------------------------------


def test_hierarchical_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = recorded(hierarchical_vae, monkeypatch)
    plot = tmp_path / "new/plot.png"
    assert hierarchical_vae.main(["--steps", "300", "--free-bits", "0.2", "--plot", str(plot)]) == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out

    digits, held_out = (x.cpu().double().numpy() for x in hierarchical_vae.load(torch.Generator().manual_seed(0)))
    plain = independent_pixels(digits, held_out, "bernoulli")
    without, with_free_bits = runs
    for run in runs:
        assert run.end.bound > run.course[0].bound
        assert run.end.bound > -plain
        kl = [run.end.lower.sum().item(), run.end.upper.sum().item()]
        row = re.search(rf"^ *{run.floor:g} +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +(\d+) of 12 +(\d+) of 6 ", out, re.M)
        assert row is not None
        *numbers, z1, z2 = (float(number) for number in row.groups())
        assert numbers == pytest.approx([-run.end.bound, plain, *kl], abs=6e-3)
        assert (z1, z2) == run.end.active
    # Every latent is kept at its free bits or above, up to what the batches of the training differ from the held-out digits.
    assert with_free_bits.end.active == (12, 6)
    assert min(with_free_bits.end.lower.min(), with_free_bits.end.upper.min()) > 0.75 * 0.2
    assert sum(without.end.active) < 18


def test_hierarchical_terms() -> None:
    digits, _ = hierarchical_vae.load(torch.Generator().manual_seed(0))
    model, x = hierarchical_vae.LadderVAE(digits.shape[1]).to(digits.device), digits[:9]
    terms, raised = model(x, 4, batch_dims=2), model(x, 4, free_bits=0.008, reduction="batchmean")
    measured = hierarchical_vae.measure(model, x, [4])
    pixels = x.float() - 0.5
    q2 = model.q_upper(pixels).chunk(2, dim=1)
    z2 = fastelbo.reparameterize(*q2, seed=8)
    q1, p1 = model.q_lower(torch.cat([pixels, z2], dim=1)).chunk(2, dim=1), model.p_lower(z2).chunk(2, dim=1)
    z1 = fastelbo.reparameterize(*q1, seed=9)
    upper, lower, prior = (Normal(mu, torch.exp(logvar / 2)) for mu, logvar in (q2, q1, p1))
    logits = model.decoder(torch.cat([z1, z2], dim=1))
    nll = F.binary_cross_entropy_with_logits(logits, x.float(), reduction="sum") / len(x)
    torch.testing.assert_close(terms.nll, nll)
    kl_lower, kl_upper = kl_divergence(lower, prior), kl_divergence(upper, Normal(0.0, 1.0))
    for found, raised_to, mean, kl in (
        (terms.lower, raised.lower, measured.lower, kl_lower),
        (terms.upper, raised.upper, measured.upper, kl_upper),
    ):
        torch.testing.assert_close(found, kl, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean, kl.mean(0).detach().cpu(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(raised_to, kl.mean(0).clamp(min=0.008).sum(), rtol=1e-5, atol=1e-6)
    below = torch.cat([kl_lower, kl_upper], dim=1).mean(0) < 0.008
    assert below.any()
    assert not below.all()
    elbo = -(nll + kl_lower.sum(1).mean() + kl_upper.sum(1).mean())
    assert measured.bound == pytest.approx(elbo.item(), rel=1e-5)


def test_hierarchical_vae_untrained_is_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hierarchical_vae.main(["--steps", "1", "--plot", str(tmp_path / "plot.png")]) == 1
    assert "Failed: not better than independent pixels" in capsys.readouterr().out


# ---- importance weights ----------------------------------------------------------------------------------------------------------


def test_iwae(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = recorded(iwae, monkeypatch)
    plot = tmp_path / "new/plot.png"
    assert iwae.main(["--steps", "300", "--samples", "10", "--plot", str(plot)]) == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert [run.samples for run in runs] == [1, 10]
    for run in runs:
        assert np.mean(run.bounds[-20:]) > np.mean(run.bounds[:20])
        bounds = torch.stack(run.held_out)
        means, errors = bounds.mean(1), bounds.std(1) / bounds.shape[1] ** 0.5
        # Never down by more than three standard errors, and at 50 samples above one sample by more than ten.
        assert (means.diff() > -3 * (errors[1:] ** 2 + errors[:-1] ** 2).sqrt()).all()
        rise, spread = run.rise(50)
        assert rise == pytest.approx(float(means[iwae.MEASURED.index(50)] - means[0]), rel=1e-4)
        assert rise > 10 * spread
        assert f"Trained on {run.samples}: 50 samples raise the bound by {rise:.3f} ± {spread:.3f} nats." in out
    # Each is the best at what it was trained on.
    one, ten = (torch.stack(run.held_out).mean(1) for run in runs)
    assert one[0] > ten[0]
    assert ten[iwae.MEASURED.index(100)] > one[iwae.MEASURED.index(100)]


@pytest.mark.parametrize("samples", [1, 7])
def test_importance_weights(samples: int) -> None:
    digits, _ = iwae.load(torch.Generator().manual_seed(0))
    model, x = iwae.VAE(digits.shape[1]).to(digits.device), digits[:9]
    mu, logvar = model.encoder(x.float() - 0.5).chunk(2, dim=1)
    z = fastelbo.reparameterize(mu, logvar, samples, seed=5)
    weights = (
        Bernoulli(logits=model.decoder(z)).log_prob(x.float()).sum(2)
        + Normal(0.0, 1.0).log_prob(z).sum(2)
        - Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(2)
    )
    expected = -weights.double().exp().mean(0).log().mean()
    torch.testing.assert_close(model.negative_bound(x, samples, seed=5).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (conv_vae.main, ["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (conv_vae.main, ["--likelihood", "laplace"], "invalid choice: 'laplace'"),
        (hierarchical_vae.main, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (hierarchical_vae.main, ["--free-bits", "0"], "--free-bits must be positive, got 0.0"),
        (iwae.main, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (iwae.main, ["--samples", "1"], "--samples must be at least 2, got 1"),
    ],
)
def test_bad_arguments_of_the_others(main: Any, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert message in capsys.readouterr().err
