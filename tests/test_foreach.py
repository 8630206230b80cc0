"""Lists of posteriors: what their single calls give, bit for bit, in one node and a few launches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BACKENDS, Backend
from torch import Tensor

import fastelbo
from fastelbo.foreach import SEED_STEP

# Rows of one tile, of several, and of none of a power of two; the last cannot share a launch's view with another layout.
SHAPES = [(3, 4), (3, 2, 5, 5), (3, 1), (3, 3000), (3, 7, 2)]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def lists(backend: Backend, count: int, dtypes: Any = (torch.float32,), shapes: Any = SHAPES) -> list[list[Tensor]]:
    """So many lists of tensors of the shapes, with the dtypes in turn."""

    def one(shape: Any, dtype: torch.dtype) -> Tensor:
        return (0.5 * torch.randn(shape)).to(backend.device, dtype).requires_grad_()

    return [[one(s, d) for s, d in zip(shapes, itertools.cycle(dtypes), strict=False)] for _ in range(count)]


def gradients(outputs: list[Tensor], of: list[Tensor], some: slice = slice(None)) -> list[Tensor | None]:
    """By upstream gradients that are the same in every call."""
    torch.manual_seed(1)
    outputs = outputs[some]
    return list(torch.autograd.grad(outputs, of, [torch.randn_like(o) for o in outputs], allow_unused=True))


def assert_same(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("prior", [False, True])
def test_kl_is_that_of_single_calls(backend: Backend, reduction: Any, prior: bool) -> None:
    tensors = lists(backend, 4 if prior else 2, (torch.float32, torch.float64, torch.bfloat16))
    options = {"reduction": reduction, "impl": backend.impl}
    kls = fastelbo.foreach_gaussian_kl(*tensors, **options)
    single = [fastelbo.gaussian_kl(*own, **options) for own in zip(*tensors, strict=True)]
    assert_same(kls, single)
    flat = [t for own in tensors for t in own]
    want = gradients(single, flat)
    assert_same(gradients(kls, flat), want)
    # A second backward starts from the inputs: an element without an upstream gradient has none.
    kls = fastelbo.foreach_gaussian_kl(*tensors, **options)
    torch.autograd.grad(kls, flat, [torch.ones_like(kl) for kl in kls], retain_graph=True)
    single = [fastelbo.gaussian_kl(*own, **options) for own in zip(*tensors, strict=True)]
    assert_same(gradients(kls, flat, slice(1, 3)), gradients(single, flat, slice(1, 3)))
    with torch.no_grad():
        assert_same(fastelbo.foreach_gaussian_kl(*tensors, **options), [kl.detach() for kl in single])


@each_backend
# A prior's form becomes the posterior's before the list is one: every pair is tried with single calls.
@pytest.mark.parametrize(
    ("form", "prior_form"), [("logvar", "std"), ("logstd", "var"), ("std", "logstd"), ("var", "logvar"), ("std", "std")]
)
def test_spreads_in_each_form(backend: Backend, form: str, prior_form: str) -> None:
    mus, spreads, prior_mus, prior_spreads = lists(backend, 4)
    if form in ("std", "var"):
        spreads = [t.detach().exp().requires_grad_() for t in spreads]
    if prior_form in ("std", "var"):
        prior_spreads = [t.detach().exp().requires_grad_() for t in prior_spreads]
    prior_spreads[1:2] = [0.5]
    given = {"mus": mus, f"{form}s": spreads, "prior_mus": prior_mus, f"prior_{prior_form}s": prior_spreads}
    each = [{name[:-1]: values[i] for name, values in given.items()} for i in range(len(mus))]
    flat = [t for values in given.values() for t in values if isinstance(t, Tensor)]
    kls = fastelbo.foreach_gaussian_kl(**given, impl=backend.impl)
    single = [fastelbo.gaussian_kl(**own, impl=backend.impl) for own in each]
    assert_same(kls, single)
    assert_same(gradients(kls, flat), gradients(single, flat))
    zs, kls = fastelbo.foreach_reparameterize_kl(**given, seed=1, impl=backend.impl)
    seeds = [(1 + i * SEED_STEP) % 2**64 for i in range(len(mus))]
    pairs = [fastelbo.reparameterize_kl(**own, seed=seed, impl=backend.impl) for own, seed in zip(each, seeds, strict=True)]
    assert_same([*zs, *kls], [*(z for z, _ in pairs), *(kl for _, kl in pairs)])


@each_backend
@pytest.mark.parametrize("noise", ["seed", "seed tensor", "eps", "own", "generator"])
def test_samples_are_those_of_single_calls(backend: Backend, noise: str) -> None:
    if backend.device.type == "cuda" and noise in ("own", "generator"):
        pytest.skip("a GPU draws one seed for the list")
    mus, logvars, eps = lists(backend, 3)
    flat, eps = [*mus, *logvars], [e.detach() for e in eps]
    seed: Any = torch.tensor(-5, device=backend.device) if noise == "seed tensor" else 2**64 - 5

    def of_list() -> dict[str, Any]:
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(4)
        return {"eps": {"eps": eps}, "own": {}, "generator": {"generator": generator}}.get(noise, {"seed": seed})

    def of_each() -> Iterator[dict[str, Any]]:
        own = of_list()
        for i in range(len(mus)):
            yield {"eps": {"eps": eps[i]}, "seed": {"seed": (2**64 - 5 + i * SEED_STEP) % 2**64}}.get(noise.split()[0], own)

    zs, kls = fastelbo.foreach_reparameterize_kl(mus, logvars, impl=backend.impl, **of_list())
    single = [
        fastelbo.reparameterize_kl(mu, logvar, impl=backend.impl, **own)
        for mu, logvar, own in zip(mus, logvars, of_each(), strict=True)
    ]
    want = [z for z, _ in single], [kl for _, kl in single]
    assert_same([*zs, *kls], [*want[0], *want[1]])
    assert_same(gradients([*zs, *kls], flat), gradients([*want[0], *want[1]], flat))
    zs, kls = fastelbo.foreach_reparameterize_kl(mus, logvars, impl=backend.impl, **of_list())
    single = [
        fastelbo.reparameterize_kl(mu, logvar, impl=backend.impl, **own)
        for mu, logvar, own in zip(mus, logvars, of_each(), strict=True)
    ]
    assert_same(gradients([zs[1], kls[3]], flat), gradients([single[1][0], single[3][1]], flat))


@each_backend
def test_only_what_requires_grad_gets_one(backend: Backend) -> None:
    tensors = lists(backend, 4)
    for i, t in enumerate(t for own in tensors for t in own):
        t.requires_grad_(i % 3 == 0)
    for own in tensors:
        own[2].requires_grad_(False)
    wanted = [t for own in tensors for t in own if t.requires_grad]
    kls = fastelbo.foreach_gaussian_kl(*tensors, impl=backend.impl)
    single = [fastelbo.gaussian_kl(*own, impl=backend.impl) for own in zip(*tensors, strict=True)]
    total, want = (torch.stack(k).sum() for k in (kls, single))
    assert_same(list(torch.autograd.grad(total, wanted)), list(torch.autograd.grad(want, wanted)))


@each_backend
def test_layouts_and_priors_that_broadcast(backend: Backend) -> None:
    moments = torch.randn(3, 8, 4, 4, device=backend.device, requires_grad=True)
    images = torch.randn(3, 4, 4, 4, device=backend.device).to(memory_format=torch.channels_last).requires_grad_()
    mus, logvars = [moments[:, :4], images, images.mT], [moments[:, 4:], images, images]
    prior_mu, prior_logvar = (torch.randn(4, 1, 1, device=backend.device, requires_grad=True) for _ in range(2))
    given = mus, logvars, [prior_mu] * 3, [prior_logvar] * 3
    wanted = [moments, images, prior_mu, prior_logvar]
    kls = fastelbo.foreach_gaussian_kl(*given, impl=backend.impl)
    single = [fastelbo.gaussian_kl(*own, impl=backend.impl) for own in zip(*given, strict=True)]
    assert_same(kls, single)
    for got, want in zip(gradients(kls, wanted), gradients(single, wanted), strict=True):
        torch.testing.assert_close(got, want)  # autograd adds what the elements give in another order


@each_backend
def test_empty(backend: Backend) -> None:
    assert fastelbo.foreach_gaussian_kl([], [], impl=backend.impl) == []
    assert fastelbo.foreach_reparameterize_kl((), (), (), (), seed=1, impl=backend.impl) == ([], [])
    mus, logvars = lists(backend, 2, shapes=[(3, 4), (0, 4), (2, 0)])
    kls = fastelbo.foreach_gaussian_kl(mus, logvars, impl=backend.impl)
    assert [kl.tolist() for kl in kls[1:]] == [[], [0.0, 0.0]]
    assert_same(kls[:1], [fastelbo.gaussian_kl(mus[0], logvars[0], impl=backend.impl)])


def test_differentiable_twice_compiled_and_transformed() -> None:
    mus, logvars = (
        [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (2, 2))] for _ in range(2)
    )  # fmt: skip

    def call(*flat: Tensor) -> tuple[Tensor, ...]:
        zs, kls = fastelbo.foreach_reparameterize_kl(flat[:2], flat[2:], seed=1)
        return *zs, *kls

    flat = [*mus, *logvars]
    assert torch.autograd.gradcheck(call, flat)
    assert torch.autograd.gradgradcheck(call, flat)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(*flat), call(*flat))
    of_sum = torch.func.grad(lambda mu: sum(kl.sum() for kl in fastelbo.foreach_gaussian_kl([mu], logvars[:1])))
    torch.testing.assert_close(of_sum(mus[0].detach()), mus[0].detach())
    with fastelbo.verify() as seen:
        call(*flat)
    assert seen.checked == 2


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"logvars": [torch.zeros(2, 3), torch.zeros(2, 4)]}, ValueError, r"logvars\[1\] has shape \(2, 4\), but mus\[1\]"),
        ({"mus": [torch.zeros(2, 3), 1.0]}, TypeError, r"mus\[1\] must be a torch.Tensor, got float"),
        ({"mus": torch.zeros(2, 2, 3)}, TypeError, "mus must be a list or tuple of tensors, got Tensor"),
        ({"logvars": [torch.zeros(2, 3)]}, ValueError, "logvars has 1 elements, but mus has 2"),
        ({"prior_mus": [torch.zeros(2, 3), torch.zeros(5)]}, ValueError, r"prior_mus\[1\] has shape \(5,\)"),
        ({"prior_logvars": [torch.zeros(3).int()] * 2}, TypeError, r"prior_logvars\[0\] must be float16"),
        ({"eps": [torch.zeros(2, 3), torch.zeros(3)]}, ValueError, r"eps\[1\] has shape \(3,\), but z will have"),
        ({"eps": [torch.zeros(2, 3)] * 2, "seed": 1}, ValueError, "at most one of eps, seed and generator, got eps and seed"),
        ({"logvars": None}, TypeError, "logvars must be a list or tuple of tensors, got NoneType, and none of logstds, stds and"),
        ({"stds": [torch.ones(2, 3)] * 2}, ValueError, "give one of logvars, logstds, stds, vars, got logvars and stds"),
        ({"prior_stds": [1.0, 0.0]}, ValueError, r"prior_stds\[1\] must be positive, got 0.0"),
        ({"prior_vars": [1.0, 1.0], "prior_stds": [1.0, 1.0]}, ValueError, "got prior_stds and prior_vars"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_errors_name_the_element(change: dict[str, Any], error: type[Exception], says: str) -> None:
    given: dict[str, Any] = {"mus": [torch.zeros(2, 3)] * 2, "logvars": [torch.zeros(2, 3)] * 2} | change
    with pytest.raises(error, match=says):
        fastelbo.foreach_reparameterize_kl(**given)


@pytest.mark.triton
def test_numbers_of_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fastelbo.kernels import launch

    names: list[str] = []
    start = launch.start

    def counted(kernel: Any, programs: int, args: Any, *tuned: Any) -> None:
        names.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        start(kernel, programs, args, *tuned)

    monkeypatch.setattr(launch, "start", counted)
    shapes = [(2, 4)] * 17 + [(2, 5000)]  # sums of the last are partial
    mus, logvars = ([torch.randn(s, device=device, requires_grad=True) for s in shapes] for _ in range(2))
    kls = fastelbo.foreach_gaussian_kl(mus, logvars, impl="triton")
    assert names == ["latents_kernel"] * 3 + ["finish_kernel"]
    names.clear()
    torch.stack(kls).sum().backward()
    assert names == ["latents_kernel"] * 3
