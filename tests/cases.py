"""What the tests of the operations share: backends, layouts, operations beside their oracles, and error bars.

An operation is given twice: as a call of fastelbo, and as an expression over the equations of `fastelbo.reference` that is
written here without any of the library's options, so that weights, reductions and broadcasting are checked against something
that does not share their code.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastelbo
from fastelbo import backend as chooser
from fastelbo import reference
from fastelbo.dtypes import LOG_2PI
from fastelbo.numerics.tolerance import Truth, arithmetic_of, mismatch

HALVES = (torch.float16, torch.bfloat16)


# ---- backends --------------------------------------------------------------------------------------------------------------------


class Backend(NamedTuple):
    impl: str
    device: torch.device

    @property
    def truncates(self) -> bool:
        """Triton's interpreter cuts bfloat16 off where a GPU rounds."""
        return self.impl == "triton" and self.device.type == "cpu"

    def ops(self) -> Any:
        """The ops that serve this backend's calls."""
        return chooser.EAGER if self.impl == "torch" else chooser.triton_backend()

    def replace(self, monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
        """Let other functions stand in for the forward or the backward of an op."""
        ops = self.ops()
        changed = ops._replace(**{name: getattr(ops, name)._replace(**functions)})
        monkeypatch.setattr(chooser, "EAGER" if self.impl == "torch" else "_triton", changed)


def _no_kernels() -> str | None:
    """Why the Triton backend cannot be tested, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


HAS_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
NO_KERNELS = _no_kernels()
TORCH = pytest.param(Backend("torch", CPU), id="torch")
TRITON = pytest.param(
    Backend("triton", torch.device("cuda") if HAS_GPU else CPU),
    id="triton",
    marks=[pytest.mark.triton, pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))],
)
# The plain-PyTorch backend on a GPU takes other paths than on a CPU: one block, no reading back of the upstream gradient.
TORCH_ON_GPU = [pytest.param(Backend("torch", torch.device("cuda")), id="torch-gpu", marks=pytest.mark.gpu)] if HAS_GPU else []
BACKENDS = [TORCH, TRITON, *TORCH_ON_GPU]

each_backend = pytest.mark.parametrize("backend", BACKENDS)


# ---- inputs: (shape to draw, how to look at it); everything drawn with one layout has one shape ----------------------------------

LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((3, 35), lambda t: t),
    "columns": ((3, 40), lambda t: t[:, 3:36]),
    "rows": ((6, 33), lambda t: t[::2]),
    "chunk1": ((3, 8, 3, 5), lambda t: t.chunk(2, 1)[1]),
    "chunk-last": ((4, 5, 14), lambda t: t.chunk(2, -1)[1]),
    "chunk2": ((2, 3, 10), lambda t: t.chunk(2, 2)[0]),
    "channels-last": ((2, 4, 3, 5), lambda t: t.to(memory_format=torch.channels_last)),
    "expanded": ((1, 4, 9), lambda t: t.expand(3, 4, 9)),
    "expanded-inner": ((3, 4, 1), lambda t: t.expand(3, 4, 9)),
    "transposed": ((4, 7, 3), lambda t: t.transpose(0, 2)),
    "spatial": ((2, 3, 6, 7), lambda t: t[:, :, 1:-1, 1:-1]),
    "5d": ((2, 3, 2, 3, 2), lambda t: t),
    "batch-1": ((1, 37), lambda t: t),
    "one": ((1, 1), lambda t: t),
    "vector": ((13,), lambda t: t),
}

DTYPES: dict[str, Sequence[torch.dtype]] = {
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float64": (torch.float64,),
    "float16": (torch.float16,),
    # Taken in turn by the inputs of a case.
    "mixed": (torch.bfloat16, torch.float32, torch.float16),
    "mixed-double": (torch.float64, torch.float16),
    "mixed-low": (torch.float16, torch.float32),
}


def draw(name: str, shape: Iterable[int], generator: torch.Generator) -> Tensor:
    """Values of a size that the named argument has in practice, in float64."""
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if name.removeprefix("prior_") in ("std", "var"):
        return torch.exp(0.5 * values)
    if name == "weight":
        return torch.where(values > 0.8, 0.0, values.abs())
    if name == "mask":
        return values < 0.7
    return values


def broadcast_shape(pattern: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a variance or weight that broadcasts to `shape`."""
    rank = len(shape)
    return {
        "0d": (),
        "one": (1,) * rank,
        "channel": tuple(shape[1:2]) + (1,) * (rank - 2),
        "dim": tuple(shape[1:]),
        "sample": tuple(shape[:1]) + (1,) * (rank - 1),
        "row2": tuple(shape[:2]) + (1,) * (rank - 2),
        "pixel": tuple(shape[:1]) + (1,) * min(1, rank - 1) + tuple(shape[2:]),
        "element": tuple(shape),
    }[pattern]


PATTERNS = ("0d", "one", "channel", "dim", "sample", "row2", "pixel", "element")


def make(names: Sequence[str], layout: str, dtype: str = "float32", seed: int = 0, **patterns: str) -> dict[str, Tensor]:
    """Inputs by name. `patterns` names those that broadcast; a mask is bool, and what is drawn is already rounded to its dtype."""
    generator = torch.Generator().manual_seed(seed)
    size, view = LAYOUTS[layout]
    shape = view(torch.empty(size)).shape
    out = {}
    for i, name in enumerate(names):
        own = DTYPES[dtype][i % len(DTYPES[dtype])]
        pattern = patterns.get(name, "element")
        if pattern == "element":
            t = view(draw(name, size, generator).to(torch.bool if name == "mask" else own))
        else:
            t = draw(name, broadcast_shape(pattern, shape), generator).to(torch.bool if name == "mask" else own)
        out[name] = t
    return out


# ---- the oracle's conventions, spelled out ---------------------------------------------------------------------------------------


def reduced(terms: Tensor, weight: Tensor | None, reduction: str, batch_dims: int) -> Tensor:
    if weight is not None:
        weight = weight.to(terms.dtype).expand(terms.shape)
        terms = torch.where(weight == 0, 0.0, terms * weight)
    batch = math.prod(terms.shape[:batch_dims])
    per_row = terms.flatten(batch_dims).sum(-1) if batch_dims < terms.ndim else terms
    if reduction == "none":
        return per_row
    if reduction == "sum":
        return per_row.sum()
    if reduction == "batchmean":
        return per_row.sum() / batch
    return terms.sum() / (terms.numel() if weight is None else weight.sum())


def present(weight: Tensor | None, *tensors: Tensor) -> Sequence[Tensor]:
    """What lies under a weight of 0 replaced before any arithmetic, so that it cannot reach a gradient as 0 * NaN."""
    return tensors if weight is None else [torch.where(weight == 0, 0.0, t) for t in tensors]


def slow_nll(
    recon: Tensor, x: Tensor, *, logvar: Any = None, std: Any = None, var: Any = None, full: bool = True,
    weight: Tensor | None = None, reduction: str = "none", batch_dims: int = 1,
) -> Tensor:  # fmt: skip
    given, form = next(((v, f) for f, v in (("logvar", logvar), ("std", std), ("var", var)) if v is not None), (0.0, "logvar"))
    spread = torch.as_tensor(given, dtype=recon.dtype, device=recon.device).expand(recon.shape)
    if form != "logvar":
        if weight is not None:
            spread = torch.where(weight == 0, 1.0, spread)
        spread = spread.log() * (2 if form == "std" else 1)
    recon, x, spread = present(weight, recon, x, spread)
    terms = -reference.gaussian_log_prob(x, recon, spread) - (0.0 if full else 0.5 * LOG_2PI)
    return reduced(terms, weight, reduction, batch_dims)


def logvar_of(form: str, spread: Tensor, weight: Tensor | None = None) -> Tensor:
    """The log-variance of a spread; that of what is absent is 0."""
    if form in ("std", "var"):
        spread = (spread if weight is None else torch.where(weight == 0, 1.0, spread)).log()
    return spread * (2 if form in ("logstd", "std") else 1)


def slow_kl(
    mu: Tensor, logvar: Tensor, prior_mu: Any = None, prior_logvar: Any = None, *, logvar_clamp: Any = None,
    weight: Tensor | None = None, reduction: str = "none", batch_dims: int = 1,
) -> Tensor:  # fmt: skip
    prior_mu, prior_logvar = (
        torch.as_tensor(0.0 if p is None else p, dtype=mu.dtype, device=mu.device).expand(mu.shape)
        for p in (prior_mu, prior_logvar)
    )
    mu, logvar, prior_mu, prior_logvar = present(weight, mu, logvar, prior_mu, prior_logvar)
    if logvar_clamp is not None:
        logvar = logvar.clamp(*logvar_clamp)
    return reduced(reference.gaussian_kl(mu, logvar, prior_mu, prior_logvar), weight, reduction, batch_dims)


def slow_sample(mu: Tensor, logvar: Tensor, eps: Tensor, logvar_clamp: Any = None) -> Tensor:
    return reference.reparameterize(mu, logvar if logvar_clamp is None else logvar.clamp(*logvar_clamp), eps)


def slow_terms(
    recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, recon_logvar: Any = None, prior_mu: Any = None,
    prior_logvar: Any = None, full: bool = True, logvar_clamp: Any = None, weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    nll = slow_nll(recon, x, logvar=recon_logvar, full=full, weight=weight, reduction=reduction)
    return nll, slow_kl(mu, logvar, prior_mu, prior_logvar, logvar_clamp=logvar_clamp, reduction=reduction)


def slow_loss(*args: Tensor, beta: Any = 1.0, **options: Any) -> Tensor:
    nll, kl = slow_terms(*args, **options)
    return nll + beta * kl


def slow_sgvb(
    decoder: Callable[[Tensor], Any], x: Tensor, mu: Tensor, logvar: Tensor, *, eps: Tensor, recon_logvar: Any = None,
    beta: Any = 1.0, full: bool = True, weight: Tensor | None = None, reduction: str = "batchmean", logvar_clamp: Any = None,
    **prior: Any,
) -> Tensor:  # fmt: skip
    """The estimator as the paper writes it: one decoder call and one likelihood per sample. eps is `(L, *mu.shape)`."""
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for noise in eps:
        out = decoder(slow_sample(mu, logvar, noise, logvar_clamp))
        recon, spread = out if isinstance(out, tuple) else (out, recon_logvar)
        total = total + slow_nll(recon, x, logvar=spread, full=full, weight=weight, reduction=reduction)
    return total / len(eps) + beta * slow_kl(mu, logvar, **prior, logvar_clamp=logvar_clamp, reduction=reduction)


# ---- running and comparing -------------------------------------------------------------------------------------------------------

Values = dict[str, Tensor]


def leaves(
    tensors: Values, wanted: Iterable[str] | None = None, device: torch.device = CPU, dtype: torch.dtype | None = None
) -> Values:
    """The tensors as leaves on the device; those named in `wanted` (None: all that are floating, but constants) require grad.

    Strides and the offset into the storage, hence the alignment, are kept unless the dtype changes.
    """
    out = {}
    for name, t in tensors.items():
        storage = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
        own = storage.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())
        if dtype is not None and t.is_floating_point():
            own = own.to(dtype)
        needs = t.is_floating_point() and name not in ("weight", "eps") if wanted is None else name in wanted
        out[name] = own.detach().requires_grad_(needs)
    return out


def run(fn: Callable[[Values], Any], inputs: Values, upstream: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Values]:
    """Outputs of fn, and the gradient of each input that requires one under the upstream gradients (1 where not given)."""
    outs = fn(inputs)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    ups = [torch.ones_like(o) for o in outs] if upstream is None else [u.to(o) for u, o in zip(upstream, outs, strict=True)]
    asked = {name: t for name, t in inputs.items() if t.requires_grad}
    grads = torch.autograd.grad(outs, list(asked.values()), ups, allow_unused=True) if asked else ()
    return [o.detach() for o in outs], dict(zip(asked, grads, strict=True))


# Relative error of one rounding to the dtype, and half its smallest step.
ROUNDING = {t: (torch.finfo(t).eps / 2, torch.finfo(t).eps * torch.finfo(t).tiny / 2) for t in (*HALVES, torch.float32)}


def assert_close(
    actual: Tensor | None, expected: Tensor, what: str, *, dtype: torch.dtype | None = None, scale: float | Tensor | None = None,
    rtol: float | None = None, acc: torch.dtype | None = None, truncates: bool = False,
) -> None:  # fmt: skip
    """Hold a result to the float64 truth by the library's rule, with an rtol ten times as strict as that of `fastelbo.verify`.

    The size of an element is its value and `scale`, the size of what was added up; the largest value by default. The arithmetic is
    done in `acc`; a result in another dtype is rounded to it once, by half a unit, or a whole one where bfloat16 is cut off.
    """
    assert actual is not None, f"{what}: nothing came back"
    value = expected.detach().double().cpu()
    acc = arithmetic_of([actual.dtype]) if acc is None else acc
    rtol = (1e-12 if acc == torch.float64 else 2e-6) if rtol is None else rtol
    roundings = 0.0 if actual.dtype == acc else 1.0 if truncates and actual.dtype == torch.bfloat16 else 0.5
    finite = value[value.isfinite()].abs()
    scale = (finite.max() if len(finite) else 0.0) if scale is None else scale
    size = value.abs() + torch.as_tensor(scale, dtype=torch.float64, device=CPU)
    truth = Truth(value, size, actual.dtype if dtype is None else dtype, torch.finfo(acc).tiny)
    wrong = mismatch(what, actual, truth, rtol, roundings)
    assert wrong is None, wrong
    assert torch.equal(actual.detach().cpu().isnan(), value.isnan()), f"{what}: NaN must be NaN, where the rule takes inf too"


def accumulated(*tensors: Tensor) -> torch.dtype:
    return arithmetic_of([t.dtype for t in tensors])


# Inputs that may broadcast, so that their gradient is a sum.
FORMS = ("logvar", "logstd", "std", "var")
SHARED = (*FORMS, "recon_logvar", "prior_mu", *(f"prior_{form}" for form in FORMS))


def upstream_for(outs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Upstream gradients that differ by row; 1 for a scalar (tests/contracts/test_autograd.py has other ones)."""
    generator = torch.Generator().manual_seed(seed)
    ups = [torch.randn(o.shape, generator=generator) if o.ndim else torch.ones(()) for o in outs]
    return [u.to(o.dtype).double() for u, o in zip(ups, outs, strict=True)]


def check(
    fast: Callable[[Values], Any], slow: Callable[[Values], Any], tensors: Values, backend: Backend, *,
    wanted: Iterable[str] | None = None, out_dtypes: Sequence[torch.dtype] | None = None, upstream: Sequence[Tensor] | None = None,
    rtol: float | None = None,
) -> None:  # fmt: skip
    """Value and every gradient of `fast` on the tensors as they are, against `slow` in float64 on the same values."""
    device = backend.device
    mine = leaves(tensors, wanted, device)
    truth = leaves(tensors, wanted, CPU, torch.float64)
    before = {name: (t.detach().clone(), t._version) for name, t in mine.items()}
    want = slow(truth)
    want = list(want) if isinstance(want, tuple) else [want]
    acc = accumulated(*(t for name, t in mine.items() if name not in ("weight", "mask", "eps")))
    if out_dtypes is None:
        out_dtypes = [acc] * len(want)
    if upstream is None:
        upstream = upstream_for([w.detach().to(d) for w, d in zip(want, out_dtypes, strict=True)])
    outs, grads = run(fast, mine, [u.to(device) for u in upstream])
    want, want_grads = run(slow, truth, upstream)
    # The size of a gradient that is summed to its input's shape is that of its shares: what it is when the input is not shared.
    own = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in truth.items()}
    for i, (out, w, dtype) in enumerate(zip(outs, want, out_dtypes, strict=True)):
        # A sample is computed from mu and logvar alone, whatever the prior's dtype.
        own_acc = acc if dtype == acc else accumulated(*(t for n, t in mine.items() if n in ("mu", "logvar", "moments")))
        assert_close(out, w, f"output {i}", dtype=dtype, rtol=rtol, acc=own_acc, truncates=backend.truncates)
    for name, t in ((name, t) for name, t in truth.items() if t.requires_grad):
        scale = None
        full = t.shape
        if name in SHARED:
            latent = name.startswith("prior") or (name in FORMS and "mu" in truth)
            full = truth["recon" if not latent else "mu" if "mu" in truth else name].shape
        if t.shape != full:
            share = run(slow, {**own, name: t.detach().expand(full).clone().requires_grad_()}, upstream)[1][name]
            # (1 - square) cancels within an element too, hence the mean.
            scale = share.abs().sum_to_size(t.shape) + share.numel() / max(1, t.numel()) * share.abs().mean()
        assert_close(grads[name], want_grads[name], f"gradient of {name}", dtype=mine[name].dtype, scale=scale, rtol=rtol, acc=acc,
                     truncates=backend.truncates)  # fmt: skip
    for name, (value, version) in before.items():
        assert mine[name]._version == version, f"{name} was written to"
        assert torch.equal(mine[name].detach(), value) or value.isnan().any(), f"{name} changed"


# ---- the operations --------------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """`fast(values, impl, **options)` and `slow(values, **options)`; `names` are its tensors."""

    names: tuple[str, ...]
    fast: Callable[..., Any]
    slow: Callable[..., Any]
    options: tuple[str, ...] = ()  # which of reduction, batch_dims, weight, logvar_clamp it takes
    returns_z: bool = False


def _decoder(z: Tensor) -> Tensor:
    """A decoder that is the same line in every dtype, in the shape of its input."""
    return 1.5 * z.tanh() + 0.1 * z


_LATENT = ("mu", "logvar")
_PRIOR = ("prior_mu", "prior_logvar")
_ALL = ("reduction", "batch_dims", "weight")

OPS: dict[str, Op] = {
    "reparameterize": Op(
        (*_LATENT, "eps"),
        lambda v, impl: fastelbo.reparameterize(v["mu"], v["logvar"], eps=v["eps"], impl=impl),
        lambda v: slow_sample(v["mu"], v["logvar"], v["eps"]),
        returns_z=True,
    ),
    "reparameterize_samples": Op(
        (*_LATENT, "eps"),
        lambda v, impl: fastelbo.reparameterize(
            v["mu"], v["logvar"], 3, eps=torch.stack([v["eps"], -v["eps"], 2 * v["eps"]]), impl=impl
        ),
        lambda v: torch.stack([slow_sample(v["mu"], v["logvar"], k * v["eps"]) for k in (1, -1, 2)]),
        returns_z=True,
    ),
    "reparameterize_kl": Op(
        (*_LATENT, "eps"),
        lambda v, impl, **o: fastelbo.reparameterize_kl(v["mu"], v["logvar"], eps=v["eps"], impl=impl, **o),
        lambda v, **o: (slow_sample(v["mu"], v["logvar"], v["eps"], o.get("logvar_clamp")), slow_kl(v["mu"], v["logvar"], **o)),
        (*_ALL, "logvar_clamp"),
        returns_z=True,
    ),
    "reparameterize_kl_prior": Op(
        (*_LATENT, *_PRIOR, "eps"),
        lambda v, impl, **o: fastelbo.reparameterize_kl(
            v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], eps=v["eps"], impl=impl, **o
        ),
        lambda v, **o: (
            slow_sample(v["mu"], v["logvar"], v["eps"], o.get("logvar_clamp")),
            slow_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], **o),
        ),
        (*_ALL, "logvar_clamp"),
        returns_z=True,
    ),
    "gaussian_kl": Op(
        _LATENT,
        lambda v, impl, **o: fastelbo.gaussian_kl(v["mu"], v["logvar"], impl=impl, **o),
        lambda v, **o: slow_kl(v["mu"], v["logvar"], **o),
        (*_ALL, "logvar_clamp"),
    ),
    "gaussian_kl_prior": Op(
        (*_LATENT, *_PRIOR),
        lambda v, impl, **o: fastelbo.gaussian_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], impl=impl, **o),
        lambda v, **o: slow_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], **o),
        (*_ALL, "logvar_clamp"),
    ),
    **{
        f"reparameterize_kl_{form}": Op(
            ("mu", form, "eps"),
            lambda v, impl, form=form, **o: fastelbo.reparameterize_kl(v["mu"], **{form: v[form]}, eps=v["eps"], impl=impl, **o),
            lambda v, form=form, **o: (
                slow_sample(v["mu"], logvar_of(form, v[form]), v["eps"]),
                slow_kl(v["mu"], logvar_of(form, v[form], o.get("weight")), **o),
            ),
            _ALL,
            returns_z=True,
        )
        for form in FORMS[1:]
    },
    **{
        f"gaussian_kl_prior_{form}": Op(
            ("mu", form, "prior_mu", f"prior_{form}"),
            lambda v, impl, form=form, **o: fastelbo.gaussian_kl(
                v["mu"], **{form: v[form]}, prior_mu=v["prior_mu"], **{f"prior_{form}": v[f"prior_{form}"]}, impl=impl, **o
            ),
            lambda v, form=form, **o: slow_kl(
                v["mu"],
                logvar_of(form, v[form], o.get("weight")),
                v["prior_mu"],
                logvar_of(form, v[f"prior_{form}"], o.get("weight")),
                **o,
            ),
            _ALL,
        )
        for form in FORMS[1:]
    },
    "gaussian_nll": Op(
        ("recon", "x"),
        lambda v, impl, **o: fastelbo.gaussian_nll(v["recon"], v["x"], impl=impl, **o),
        lambda v, **o: slow_nll(v["recon"], v["x"], **o),
        _ALL,
    ),
    **{
        f"gaussian_nll_{form}": Op(
            ("recon", "x", form),
            lambda v, impl, form=form, **o: fastelbo.gaussian_nll(v["recon"], v["x"], impl=impl, **{form: v[form]}, **o),
            lambda v, form=form, **o: slow_nll(v["recon"], v["x"], **{form: v[form]}, **o),
            _ALL,
        )
        for form in ("logvar", "std", "var")
    },
    **{
        f"gaussian_nll_{form}_float": Op(
            ("recon", "x"),
            lambda v, impl, form=form, **o: fastelbo.gaussian_nll(v["recon"], v["x"], impl=impl, **{form: 0.7}, **o),
            lambda v, form=form, **o: slow_nll(v["recon"], v["x"], **{form: 0.7}, **o),
            _ALL,
        )
        for form in ("logvar", "std", "var")
    },
    "elbo_terms": Op(
        ("recon", "x", "recon_logvar", *_LATENT),
        lambda v, impl, **o: fastelbo.elbo_terms(
            v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["recon_logvar"], impl=impl, **o
        ),
        lambda v, **o: slow_terms(v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["recon_logvar"], **o),
        ("reduction", "weight", "logvar_clamp"),
    ),
    "elbo_loss": Op(
        ("recon", "x", "recon_logvar", *_LATENT),
        lambda v, impl, **o: fastelbo.elbo_loss(
            v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["recon_logvar"], beta=0.3, impl=impl, **o
        ),
        lambda v, **o: slow_loss(v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["recon_logvar"], beta=0.3, **o),
        ("reduction", "weight", "logvar_clamp"),
    ),
    "elbo_loss_unit": Op(
        ("recon", "x", *_LATENT, *_PRIOR),
        lambda v, impl, **o: fastelbo.elbo_loss(
            v["recon"],
            v["x"],
            v["mu"],
            v["logvar"],
            prior_mu=v["prior_mu"],
            prior_logvar=v["prior_logvar"],
            full=False,
            impl=impl,
            **o,
        ),
        lambda v, **o: slow_loss(
            v["recon"], v["x"], v["mu"], v["logvar"], prior_mu=v["prior_mu"], prior_logvar=v["prior_logvar"], full=False, **o
        ),
        ("reduction", "weight", "logvar_clamp"),
    ),
    "DiagonalGaussian": Op(
        ("mu", "logvar", "prior_mu", "prior_logvar", "eps"),
        lambda v, impl, **o: fastelbo.DiagonalGaussian(v["mu"], v["logvar"], impl=impl).rsample_kl(
            fastelbo.DiagonalGaussian(v["prior_mu"], v["prior_logvar"]), eps=v["eps"], **o
        ),
        lambda v, **o: (
            slow_sample(v["mu"], v["logvar"], v["eps"]),
            slow_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], **o),
        ),
        _ALL,
        returns_z=True,
    ),
}
