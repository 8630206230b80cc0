"""What only a GPU can show. The other tests run their Triton half natively there too (`pytest -m "gpu or triton"`)."""

from __future__ import annotations

import pytest
import torch

import fastelbo

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def _inputs(batch: int = 64, d: int = 784, j: int = 20, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = [(batch, d), (batch, d), (batch, j), (batch, j)]
    return [torch.randn(s, device=CUDA, dtype=dtype).requires_grad_(i != 1) for i, s in enumerate(shapes)]


def test_auto_picks_triton() -> None:
    from fastelbo import backend

    assert backend.choose(None, CUDA) is backend.kernels()


def test_no_host_synchronisation() -> None:
    recon, x, mu, logvar = _inputs()
    beta = torch.tensor(0.5, device=CUDA)
    weight = (torch.rand(64, 784, device=CUDA) > 0.5).float()

    def step() -> None:
        z, kl = fastelbo.reparameterize_kl(mu, logvar)
        loss = fastelbo.elbo_loss(recon, x, mu, logvar, beta=beta, weight=weight, reduction="mean")
        nll = fastelbo.gaussian_nll_loss(recon, x, torch.ones_like(recon))
        (loss * 3 + z.sum() + kl.sum() + nll).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_with_new_noise() -> None:
    _, _, mu, logvar = (t.detach() for t in _inputs())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            fastelbo.reparameterize_kl(mu, logvar)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, kl = fastelbo.reparameterize_kl(mu, logvar)
    graph.replay()
    first, kl_first = z.clone(), kl.clone()
    graph.replay()
    assert not torch.equal(first, z)
    assert torch.equal(kl_first, kl)
    torch.testing.assert_close(((z - mu) / torch.exp(0.5 * logvar)).std(), torch.ones((), device=CUDA), atol=0.1, rtol=0)


def test_seed_gives_the_noise_of_the_cpu() -> None:
    mu, logvar = torch.zeros(37, 21), torch.zeros(37, 21)
    on_cpu = fastelbo.reparameterize(mu, logvar, 3, seed=2**40 + 7)
    on_gpu = fastelbo.reparameterize(mu.cuda(), logvar.cuda(), 3, seed=2**40 + 7)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=2e-6, atol=2e-6)


def test_deterministic() -> None:
    inputs = _inputs(32, 20_000, 300)
    recon_logvar = torch.zeros(20_000, device=CUDA, requires_grad=True)
    results = []
    for _ in range(3):
        loss = fastelbo.elbo_loss(*inputs, recon_logvar=recon_logvar)
        results.append([loss, *torch.autograd.grad(loss, [inputs[0], inputs[2], inputs[3], recon_logvar])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 5 * 2 * n:
        pytest.skip("needs 22 GB of GPU memory")
    recon, x = torch.zeros(2, n // 2, device=CUDA, dtype=torch.bfloat16), torch.zeros(2, n // 2, device=CUDA, dtype=torch.bfloat16)
    recon[1, -1] = 3.0
    recon[0, 5] = 2.0
    recon.requires_grad_()
    nll = fastelbo.gaussian_nll(recon, x, full=False)
    assert nll.tolist() == [2.0, 4.5]
    (grad,) = torch.autograd.grad(nll.sum(), recon)
    assert float(grad[1, -1]) == 3.0
    assert float(grad[0, 5]) == 2.0
    assert float(grad.abs().sum(dtype=torch.float32)) == 5.0


def test_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = [t.detach().to("cuda:1").requires_grad_() for t in _inputs()]
    with torch.cuda.device(0):
        fastelbo.elbo_loss(*inputs).backward()
    assert all(bool(torch.isfinite(t.grad).all()) for t in inputs)


def test_compiled_with_inductor() -> None:
    inputs = _inputs()
    compiled = torch.compile(lambda *a: fastelbo.elbo_loss(*a, beta=0.5), fullgraph=True)
    plain = fastelbo.elbo_loss(*inputs, beta=0.5)
    fused = compiled(*inputs)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)
    wanted = [inputs[0], inputs[2], inputs[3]]
    for a, b in zip(torch.autograd.grad(fused, wanted), torch.autograd.grad(plain, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype=dtype)
    scaler = torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", dtype=dtype):
        loss = fastelbo.elbo_loss(*inputs, reduction="mean")
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    wide = [t.detach().double().requires_grad_() for t in inputs]
    fastelbo.elbo_loss(*wide, reduction="mean", impl="reference").backward()
    scale = float(scaler.get_scale())
    torch.testing.assert_close(inputs[0].grad.double(), wide[0].grad * scale, rtol=2**-7, atol=0)
