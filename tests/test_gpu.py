"""What only a GPU can show. The other tests run their Triton half natively there too (`pytest -m "gpu or triton"`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

import fastelbo

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def _inputs(batch: int = 64, d: int = 784, j: int = 20, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = [(batch, d), (batch, d), (batch, j), (batch, j)]
    return [torch.randn(s, device=CUDA, dtype=dtype).requires_grad_(i != 1) for i, s in enumerate(shapes)]


def _step_of(name: str, device: torch.device = CUDA) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
    """The inputs of a function, and a step with it: what it returns, and the gradients of the inputs that require them."""
    recon, x, mu, logvar = (t.detach().to(device).requires_grad_(t.requires_grad) for t in _inputs())
    weight = torch.randn(784, 20, device=device).requires_grad_()
    calls: dict[str, tuple[list[torch.Tensor], Callable[[], Sequence[torch.Tensor]]]] = {
        "reparameterize": ([mu, logvar], lambda: [fastelbo.reparameterize(mu, logvar, seed=3)]),
        "reparameterize_kl": ([mu, logvar], lambda: fastelbo.reparameterize_kl(mu, logvar, seed=3)),
        "gaussian_kl": ([mu, logvar], lambda: [fastelbo.gaussian_kl(mu, logvar)]),
        "gaussian_nll": ([recon, x], lambda: [fastelbo.gaussian_nll(recon, x)]),
        "elbo_loss": ([recon, x, mu, logvar], lambda: [fastelbo.elbo_loss(recon, x, mu, logvar)]),
        "elbo_terms": ([recon, x, mu, logvar], lambda: fastelbo.elbo_terms(recon, x, mu, logvar)),
        "linear_gaussian_nll": ([mu, weight, x], lambda: [fastelbo.linear_gaussian_nll(mu, weight, x)]),
        "linear_elbo_loss": ([x, mu, logvar, weight], lambda: [fastelbo.linear_elbo_loss(x, mu, logvar, weight, seed=3)]),
    }
    inputs, call = calls[name]

    def step() -> list[torch.Tensor]:
        outputs = call()
        total = torch.stack([t.sum() for t in outputs]).sum()
        return [*(t.detach() for t in outputs), *torch.autograd.grad(total, [t for t in inputs if t.requires_grad])]

    return inputs, step


FUNCTIONS = (
    "reparameterize", "reparameterize_kl", "gaussian_kl", "gaussian_nll", "elbo_loss", "elbo_terms", "linear_gaussian_nll",
    "linear_elbo_loss",
)  # fmt: skip
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def test_auto_picks_triton() -> None:
    from fastelbo import backend

    assert backend.choose(None, CUDA) is backend.triton_backend()


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


@each_function
def test_cuda_graph_of_a_step_reads_its_inputs_again(name: str) -> None:
    inputs, step = _step_of(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in inputs:
            t.mul_(0.5)
    graph.replay()
    for got, want in zip([t.clone() for t in captured], step(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_cuda_graph_sees_the_beta_of_a_module() -> None:
    inputs = [t.detach() for t in _inputs()]
    loss = fastelbo.ELBOLoss(1.0).to(CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss(*inputs)
    loss.beta = 0.25
    graph.replay()
    torch.testing.assert_close(captured, fastelbo.elbo_loss(*inputs, beta=0.25))


@each_function
def test_side_stream_waits_for_what_runs_there(name: str) -> None:
    """Launches and the memory between them belong to the current stream: inputs written late on it are seen."""
    inputs, step = _step_of(name)
    values = [t.detach().clone() for t in inputs]
    want = step()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for t in inputs:
            t.fill_(float("nan"))
        torch.cuda._sleep(20_000_000)
        for t, value in zip(inputs, values, strict=True):
            t.copy_(value)
        with torch.enable_grad():
            got = step()
    side.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


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


@each_function
def test_device_that_is_not_current(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    second = torch.device("cuda:1")
    ours, on_first = _step_of(name)
    others, on_second = _step_of(name, second)
    with torch.no_grad():
        for t, value in zip(others, ours, strict=True):
            t.copy_(value)
    with torch.cuda.device(0):
        got = on_second()
    assert all(t.device == second for t in got)
    for a, b in zip(got, on_first(), strict=True):
        torch.testing.assert_close(a.to(CUDA), b)


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
