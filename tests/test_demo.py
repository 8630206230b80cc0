"""The demo: the two losses are the same function, the runs agree at every step, and it says so when they do not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from rich.console import Console

import fastelbo
from fastelbo import cli, demo


def outputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """recon, recon_logvar, x, mu, logvar"""
    shapes = (7, 64), (7, 64), (7, 64), (7, 10), (7, 10)
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_(i != 2) for i, shape in enumerate(shapes)]


def test_the_two_losses_are_one_function(device: torch.device) -> None:
    found = []
    at = outputs(torch.float64, device)
    for loss_of in (demo.usual_loss, demo.fused_loss):
        loss, nll, kl = loss_of(*at)
        torch.testing.assert_close(loss.detach(), nll + kl)
        found.append((loss, nll, kl, *torch.autograd.grad(loss, [t for t in at if t.requires_grad])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_figures_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    epochs, threads = 12, torch.get_num_threads()
    assert cli.main(["demo", "--epochs", str(epochs), "--seed", "3", "--out", str(tmp_path / "new")]) == 0
    assert torch.get_num_threads() == threads
    figures = json.loads((tmp_path / "new/demo.json").read_text())
    assert (tmp_path / "new/demo.png").read_bytes()[:4] == b"\x89PNG"

    usual, fused = figures["losses"]
    assert len(usual) == len(fused) == len(figures["drift"]) == epochs
    assert all(len(seconds) == epochs and min(seconds) > 0 for seconds in figures["seconds"])
    assert max(abs(a - b) / abs(a) for a, b in zip(usual, fused, strict=True)) < 1e-6
    assert max(figures["gradients"]) < 1e-5
    assert figures["epochs"][-1]["held_out"][1] < figures["epochs"][0]["held_out"][1] - 0.1
    for row in figures["epochs"]:
        for run in (0, 1):
            assert row["loss"][run] == figures["losses"][run][row["epoch"] - 1]
            assert row["nll"][run] + row["kl"][run] == pytest.approx(row["loss"][run], rel=1e-6)
    assert figures["epochs"][-1]["epoch"] == epochs

    out = capsys.readouterr().out
    assert f"{-usual[-1]:.2f} {-fused[-1]:.2f}" in out
    assert "times as fast" in out
    assert "The runs agree" in out


def test_a_seed_gives_the_same_run(device: torch.device) -> None:
    before = torch.get_rng_state()
    runs = [demo.train(3, seed, device, Console(quiet=True))[0].losses for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1]
    assert abs(runs[0][0][0] - runs[2][0][0]) > 1e-3


@pytest.mark.parametrize("factor", [1 + 1e-3, float("nan")])
def test_disagreement_is_an_exit_status(
    factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = demo.fused_loss

    def wrong(*args: Tensor) -> demo.Terms:
        loss, nll, kl = right(*args)
        return loss * factor, nll, kl

    monkeypatch.setattr(demo, "fused_loss", wrong)
    assert cli.main(["demo", "--epochs", "2", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "The runs disagree" in capsys.readouterr().out


def test_starts_near_the_best_gaussian_without_z() -> None:
    data = demo.load(0, torch.device("cpu"))
    assert (len(data.train), len(data.held_out)) == (1797 - demo.HELD_OUT, demo.HELD_OUT)
    x, noise = data.batch()
    assert 0 <= (x - data.train).min() < (x - data.train).max() < 1
    torch.manual_seed(0)
    model = demo.VAE(data.train)
    loss = demo.usual_loss(*model(x, noise))[0]
    best = -torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x).sum(1).mean()
    assert abs(loss - best) < 1.5


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "file").touch()
    assert cli.main(["demo", "--epochs", "0"]) == 2
    assert "epochs must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["demo", "--epochs", "1", "--out", str(file)]) == 2
    assert "file" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["demo", "--device", "cuda"]) == 2
        assert "sees no GPU" in capsys.readouterr().err


def test_the_bound_rises_on_the_demos_model(device: torch.device) -> None:
    """With more importance samples, on digits that were held out, by more than the standard error of the difference."""
    _, model, data = demo.train(30, 1, device, Console(quiet=True))
    model.requires_grad_(False)
    x = data.held_out[:100]
    mu, logvar = model.encode(x)
    bounds = []
    for samples in (1, 5, 25):
        each = [
            -fastelbo.sgvb_loss(model.decode, x, mu, logvar, num_samples=samples, objective="iwae", reduction="none", seed=seed)
            for seed in range(8)
        ]
        bounds.append(torch.stack(each))
    for fewer, more in itertools.pairwise(bounds):
        rise = (more - fewer).mean(1)
        assert float(rise.mean()) > 2 * float(rise.std()) / len(rise) ** 0.5
    elbo = -fastelbo.sgvb_loss(model.decode, x, mu, logvar, num_samples=25, seed=0)
    assert float(bounds[-1].mean()) > float(elbo)
