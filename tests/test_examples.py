"""The examples: the linear VAE finds probabilistic PCA's optimum, and says so when it does not."""

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

from sklearn.datasets import load_digits

import fastelbo
from examples import linear_vae

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
