"""One of two processes of tests/contracts/test_distributed.py: RANK, the file where they meet, and that of the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastelbo

BATCH, ELEMENTS, LATENTS = 6, 5, 3
W = torch.linspace(-1, 1, ELEMENTS * LATENTS).view(ELEMENTS, LATENTS)


def values() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {"recon": ELEMENTS, "x": ELEMENTS, "mu": LATENTS, "logvar": LATENTS}
    return {name: torch.randn(BATCH, n, generator=g, dtype=torch.float64) for name, n in shapes.items()}


def layer(like: Tensor) -> Tensor:
    weight = W.to(like.dtype)
    return distribute_tensor(weight, like.device_mesh, [Replicate()]) if isinstance(like, DTensor) else weight


Call = Callable[[dict[str, Tensor]], Any]
CALLS: dict[str, Call] = {
    "reparameterize": lambda t: fastelbo.reparameterize(t["mu"], t["logvar"], seed=3),
    "reparameterize_kl": lambda t: fastelbo.reparameterize_kl(t["mu"], t["logvar"], seed=3, num_samples=2, reduction="mean"),
    "gaussian_kl": lambda t: fastelbo.gaussian_kl(t["mu"], t["logvar"], 0.5, logvar_clamp=(-1, 1)),
    "gaussian_nll": lambda t: fastelbo.gaussian_nll(t["recon"], t["x"], std=0.7, reduction="batchmean"),
    "gaussian_nll_loss": lambda t: fastelbo.gaussian_nll_loss(t["recon"], t["x"], 0.5),
    "elbo_terms": lambda t: fastelbo.elbo_terms(t["recon"], t["x"], t["mu"], t["logvar"], recon_logvar=t["x"], reduction="none"),
    "elbo_loss": lambda t: fastelbo.elbo_loss(t["recon"], t["x"], t["mu"], t["logvar"], beta=0.5),
    "sgvb_loss": lambda t: fastelbo.sgvb_loss(lambda z: z @ layer(z).T, t["x"], t["mu"], t["logvar"], seed=3),
    "linear_gaussian_nll": lambda t: fastelbo.linear_gaussian_nll(t["mu"], layer(t["mu"]), t["x"]),
    "linear_elbo_loss": lambda t: fastelbo.linear_elbo_loss(t["x"], t["mu"], t["logvar"], layer(t["mu"]), seed=3),
    "DiagonalGaussian": lambda t: fastelbo.DiagonalGaussian.from_moments(t["recon"][:, :4]).kl(),
}


def results(call: Call, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients, whole."""
    out = call(inputs)
    outs = out if isinstance(out, tuple) else (out,)
    found = torch.autograd.grad(sum(o.sum() for o in outs), list(inputs.values()), allow_unused=True)
    got = [*outs, *(g for g in found if g is not None)]
    assert len({isinstance(t, DTensor) for t in got}) == 1, "a plain tensor among DTensors"
    return [t.full_tensor().detach() if isinstance(t, DTensor) else t.detach() for t in got]


def of_sharded_inputs(call: Call, mesh: DeviceMesh) -> float:
    """The largest difference between a batch on two processes and the whole."""
    want = results(call, {n: t.clone().requires_grad_() for n, t in values().items()})
    got = results(call, {n: distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for n, t in values().items()})
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.encoder, self.decoder = nn.Linear(ELEMENTS, 2 * LATENTS), nn.Linear(LATENTS, ELEMENTS)
        # (1,), since fully_shard takes no parameter without a dimension.
        self.loss = fastelbo.ELBOLoss(0.5, recon_logvar=nn.Parameter(torch.zeros(1)))

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, -1)
        return self.loss(self.decoder(fastelbo.reparameterize(mu, logvar, eps=eps)), x, mu, logvar)


def of_a_wrapped_model(wrap: Callable[[VAE], nn.Module], rank: int) -> float:
    """The largest difference from the gradients of one process that has the whole batch."""
    x, eps = values()["x"].float(), values()["mu"].float()
    alone = VAE()
    alone(x, eps).backward()
    want = {name: p.grad for name, p in alone.named_parameters()}
    model = wrap(VAE())
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    model(x[half], eps[half]).backward()
    worst = 0.0
    for name, p in model.named_parameters():
        found = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        expected = want[name.removeprefix("module.")]
        assert found is not None
        assert expected is not None
        worst = max(worst, float((found - expected).abs().max()))
    return worst


def main(rank: int, meeting: str, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {f"DTensor {name}": of_sharded_inputs(call, mesh) for name, call in CALLS.items()}
    found["DDP"] = of_a_wrapped_model(DistributedDataParallel, rank)

    def sharded(model: VAE) -> nn.Module:
        fully_shard(model.loss, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    found["FSDP2"] = of_a_wrapped_model(sharded, rank)
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.barrier()  # nobody leaves while the other still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
