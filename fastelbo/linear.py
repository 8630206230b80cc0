"""Where the decoder ends in a linear layer: from its input and x straight to the loss, with no reconstruction in memory.

A traced function (torch.compile, torch.export) must not open the likelihood up: as expressions it would store the reconstruction,
and a loop over tiles would unroll. There the likelihood is one operator, which calls the backend when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import arguments, autograd, backend, checks, composed
from .dtypes import accumulate_dtype, has_float16, plain
from .latent import reparameterised
from .specs import KL, Gradients, Likelihood, Linear, LinearElbo, LinearElboInputs, LinearInputs, Needs, Op
from .tracing import one_node
from .types import Impl, Int, LinearElboOptions, Number, Precision, Reduction, Seed

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PRECISIONS = (None, "ieee", "tf32", "tf32x3")


# ---- the likelihood as an operator of a traced function --------------------------------------------------------------------------


def _arguments(names: str) -> str:
    return f"Tensor h, Tensor x, Tensor weight, Tensor? bias, Tensor? variance, {names}, bool full, str? precision, str? impl"


def _served(
    inputs: LinearInputs, keep: int, full: bool, precision: Precision | None, impl: Impl | None
) -> tuple[Op, LinearInputs, Linear]:
    chosen = backend.choose_linear(impl, inputs)
    assert chosen is not None, "the reference is traced as it is"
    return chosen.linear_nll, inputs, Linear(Likelihood(keep, full=full), precision)


@torch.library.custom_op("fastelbo::linear_nll", mutates_args=(), schema=f"({_arguments('bool[] ready, int keep')}) -> Tensor[]")
def _nll_op(
    h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, variance: Tensor | None, ready: Sequence[bool], keep: int,
    full: bool, precision: Precision | None, impl: Impl | None,
) -> list[Tensor]:  # fmt: skip
    """-log N(x; h weight^T + bias, exp(variance)), summed over all but the first `keep` dimensions; and of a total the gradients
    that `ready` names.
    """
    op, inputs, spec = _served(LinearInputs(h, x, weight, bias, variance), keep, full, precision, impl)
    (nll,), gradients = op.forward(inputs, spec, tuple(ready))
    assert nll is not None
    if gradients is None and True in ready:
        gradients = op.backward(inputs, spec, (torch.ones_like(nll),), tuple(ready), None)
    return [nll, *(g for g in gradients or () if g is not None)]


@torch.library.custom_op(
    "fastelbo::linear_nll_backward",
    mutates_args=(),
    schema=f"({_arguments('Tensor grad_output, bool[] needs, int keep')}) -> Tensor[]",
)
def _nll_backward_op(
    h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, variance: Tensor | None, grad_output: Tensor, needs: Sequence[bool],
    keep: int, full: bool, precision: Precision | None, impl: Impl | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `needs` names."""
    op, inputs, spec = _served(LinearInputs(h, x, weight, bias, variance), keep, full, precision, impl)
    return [g for g in op.backward(inputs, spec, (grad_output,), tuple(needs), None) if g is not None]


@_nll_op.register_fake
def _(
    h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, variance: Tensor | None, ready: Sequence[bool], keep: int, *_: Any
) -> list[Tensor]:  # fmt: skip
    tensors = h, x, weight, bias, variance
    return [h.new_empty(h.shape[:keep], dtype=accumulate_dtype(*tensors)), *_like_those(tensors, ready)]


@_nll_backward_op.register_fake
def _(
    h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, variance: Tensor | None, grad_output: Tensor, needs: Sequence[bool],
    *_: Any,
) -> list[Tensor]:  # fmt: skip
    return _like_those((h, x, weight, bias, variance), needs)


def _like_those(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip(tensors, wanted, strict=True) if want and t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.ready, ctx.options = inputs[5], inputs[6:]
    ctx.save_for_backward(*(output[1:] if True in ctx.ready else inputs[:5]))


def _differentiate(ctx: Any, grad_outputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    grad_output, needs = grad_outputs[0], ctx.needs_input_grad[:5]
    if True in ctx.ready:
        needs, gradients = ctx.ready, [(g * grad_output).to(g.dtype) for g in ctx.saved_tensors]
    else:
        gradients = _nll_backward_op(*ctx.saved_tensors, grad_output, list(needs), *ctx.options)
    each = iter(gradients)
    return *(next(each) if need else None for need in needs), *(None,) * (1 + len(ctx.options))


_nll_op.register_autograd(_differentiate, setup_context=_save)


def _traced_nll(impl: Impl | None) -> Op:
    """The operator as an op whose outputs autograd differentiates."""

    def forward(inputs: LinearInputs, spec: Linear, needs: Needs) -> tuple[tuple[Tensor], None]:
        likelihood = spec.likelihood
        # A total's gradients are made along with it, which saves a product. They are no part of a program that is exported, and
        # in float16 they could underflow before GradScaler's factor is known.
        early = likelihood.keep == 0 and torch.is_grad_enabled() and not torch.compiler.is_exporting() and not has_float16(inputs)
        ready = [early and t is not None and t.requires_grad for t in inputs]
        # The scale may be a symbolic number, which a product with a tensor takes, and the operator does not.
        nll = _nll_op(*inputs, ready, likelihood.keep, likelihood.full, spec.precision, impl)[0]
        return (nll * likelihood.scale,), None

    return Op(forward, _no_backward)


def _traced_latent(impl: Impl | None) -> Op:
    return Op(lambda inputs, spec, needs: (reparameterised(inputs, spec, impl), None), _no_backward)


def _no_backward(*_: Any) -> Gradients:
    raise AssertionError("autograd differentiates what a traced op returns")


# ---- what both functions check ---------------------------------------------------------------------------------------------------


def _matrix(name: str, t: Any, rows: str, columns: str, device: torch.device | None = None) -> None:
    checks.tensor(name, t, device)
    if t.ndim != 2:
        raise ValueError(f"{name} must be a matrix ({rows}, {columns}), got shape {checks.shape_of(t)}")


def check_layer(x: Any, weight: Any, bias: Any, logvar: Any, name: str, precision: Any) -> tuple[Tensor | None, float]:
    """Check x and what maps to it; return the log-variance as a tensor, or as the number that stands for a missing one."""
    _matrix("x", x, "batch", "elements")
    _matrix("weight", weight, "elements", "hidden", x.device)
    if weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight has shape {checks.shape_of(weight)}, but x has shape {checks.shape_of(x)}: weight must have a row for each "
            "column of x, as in torch.nn.Linear"
        )
    if bias is not None:
        checks.tensor("bias", bias, x.device)
        if bias.shape != x.shape[1:]:
            raise ValueError(f"bias has shape {checks.shape_of(bias)}, expected one value for each of {x.shape[1]} columns of x")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, _PRECISIONS))}, got {precision!r}")
    if logvar is None:
        return None, 0.0
    variance, _, number = arguments.variance(name, "logvar", logvar, x)
    if isinstance(logvar, Tensor) and logvar.numel() != 1 and logvar.shape != x.shape[1:]:
        raise ValueError(
            f"{name} has shape {checks.shape_of(logvar)}, expected one value, or one for each of {x.shape[1]} columns of x"
        )
    return variance, number


# ---- the functions ---------------------------------------------------------------------------------------------------------------


@one_node
def linear_gaussian_nll(
    h: Tensor,
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    logvar: Tensor | Number | None = None,
    full: bool = True,
    reduction: Reduction = "none",
    precision: Precision | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """-log N(x; h weight^T + bias, exp(logvar)), in nats, without the `(batch, elements)` mean or its gradient in memory.

    What `gaussian_nll(F.linear(h, weight, bias), x, logvar=logvar)` computes (Kingma & Welling 2014, appendix C.2), for the last
    layer of any decoder. Backward recomputes the products where the forward pass has not written the gradients, as it has not under
    torch.compile. With impl="reference" the mean is in memory after all; x's gradient, if asked for, has x's size anyway.

    Args:
        h: Input of the layer, `(batch, hidden)`, of any floating dtype.
        weight: `(elements, hidden)`, as in `torch.nn.Linear`.
        x: Data, `(batch, elements)`.
        bias: `(elements,)` or None.
        logvar: Log-variance: None is unit variance; a number; or a tensor, learned or not, of one value or of one for each
            element, `(elements,)`.
        full: Include the constant (1/2) log 2 pi per element.
        reduction: "none" is per sample, `(batch,)`; "batchmean" is their mean; "sum" sums everything; "mean" divides by the number
            of elements.
        precision: Of float32 products on a GPU: "ieee", "tf32x3" or "tf32"; None is what `torch.get_float32_matmul_precision()`
            says: highest, high or medium, in this order. Elsewhere torch's settings rule. Where products are torch's own (hidden
            sizes above 128) "tf32x3" is "ieee".
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The negative log-likelihood in float32 (float64 if any input is), differentiable in h, weight, x, bias and logvar, twice.
        Half precision: products take h and weight as they are and accumulate in float32; the mean is not rounded.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    variance, number = check_layer(x, weight, bias, logvar, "logvar", precision)
    _matrix("h", h, "batch", "hidden", x.device)
    if h.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(
            f"h has shape {checks.shape_of(h)}, expected (batch, hidden) = {(x.shape[0], weight.shape[1])} by x and weight"
        )
    keep = checks.kept_dims(reduction, 1, 2)
    inputs = LinearInputs(h, x, weight, bias, variance)
    scale = arguments.scale_of(reduction, 1, x.shape)
    spec = Linear(Likelihood(keep, scale, logvar=number, full=bool(full)), precision)
    chosen = backend.choose_linear(impl, inputs)
    if chosen is not None and torch.compiler.is_compiling():
        outputs: Any = _traced_nll(impl).forward(inputs, spec, (False,) * 5)[0]
    else:
        outputs = autograd.call(autograd.LinearNLL, chosen, spec, inputs)
    return outputs[0]


@overload
def linear_elbo_loss(
    x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor, bias: Tensor | None = None, *, return_terms: Literal[False] = False,
    **options: Unpack[LinearElboOptions],
) -> Tensor: ...  # fmt: skip


@overload
def linear_elbo_loss(
    x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor, bias: Tensor | None = None, *, return_terms: Literal[True],
    **options: Unpack[LinearElboOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@overload
def linear_elbo_loss(
    x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor, bias: Tensor | None = None, *, return_terms: bool,
    **options: Unpack[LinearElboOptions],
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@one_node
def linear_elbo_loss(
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recon_logvar: Tensor | Number | None = None,
    prior_mu: Tensor | Number | None = None,
    prior_logvar: Tensor | Number | None = None,
    beta: Tensor | Number = 1.0,
    num_samples: Int | None = None,
    eps: Tensor | None = None,
    seed: Seed | None = None,
    generator: torch.Generator | None = None,
    full: bool = True,
    reduction: Reduction = "batchmean",
    return_terms: bool = False,
    precision: Precision | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The negative ELBO of a VAE whose decoder is one linear layer: -log N(x; z weight^T + bias, exp(recon_logvar)) + beta * KL.

    z is sampled from N(mu, exp(logvar)), on a GPU by the kernel that uses it, and the reconstruction is not in memory, except where
    `linear_gaussian_nll` says so: Kingma & Welling 2014, equation 10, for linear VAEs and pPCA (Lucas et al. 2019), linearly
    decoded single-cell models, tabular and recommender decoders.

    Args:
        x: Data, `(batch, elements)`.
        mu, logvar: The posterior, `(batch, latents)`.
        weight: The decoder's matrix, `(elements, latents)`, as in `torch.nn.Linear`.
        bias: `(elements,)` or None.
        recon_logvar: Log-variance of the likelihood: None is unit variance; a number; or a tensor, learned or not, of one value or
            of one for each element, `(elements,)`.
        num_samples: None for one sample of z per data point; L to average the likelihood over L of them.
        eps, seed, generator: The noise, as in `reparameterize`: the same seed gives the same z, and the same loss as
            `reparameterize_kl`, a matrix product and `gaussian_nll` give one after the other.
        prior_mu, prior_logvar, beta, full, reduction, return_terms, impl: As in `elbo_loss`.
        precision: As in `linear_gaussian_nll`.

    Returns:
        The loss in nats, differentiable in x, mu, logvar, weight, bias, recon_logvar and the prior; with `return_terms`
        (loss, nll, kl), the terms without gradient.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two sources of noise are given.
    """
    variance, number = check_layer(x, weight, bias, recon_logvar, "recon_logvar", precision)
    checks.pair("mu", mu, "logvar", logvar, x.device)
    if mu.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(
            f"mu has shape {checks.shape_of(mu)}, expected (batch, latents) = {(x.shape[0], weight.shape[1])} by x and weight"
        )
    prior = arguments.posterior(mu, logvar, prior_mu, ("prior_logvar", prior_logvar), None)[2:4]
    keep = checks.kept_dims(reduction, 1, 2)
    samples: int | None = plain(num_samples)
    noise = arguments.noise(mu, samples, eps, seed, generator)
    inputs = LinearElboInputs(x, mu, logvar, weight, bias, variance, *prior, *noise)
    factor = arguments.factor("beta", beta, inputs[:8], x.device, x.shape[0])
    scale, kl_scale = (arguments.scale_of(reduction, 1, t.shape) for t in (x, mu))
    likelihood = Likelihood(keep, scale / (samples or 1), logvar=number, full=bool(full))
    spec = LinearElbo(Linear(likelihood, precision), KL(keep, kl_scale), samples, factor, return_terms)
    chosen = backend.choose_linear(impl, inputs, samples)
    outputs: Any
    if chosen is not None and (torch.compiler.is_compiling() or not arguments.is_constant(factor)):
        apart = spec._replace(kl=arguments.before_beta(factor, spec.kl), beta=1.0, return_terms=True)
        of_both = composed.linear_elbo(_traced_latent(impl), _traced_nll(impl))
        nll, kl = of_both.forward(inputs, apart, (False,) * 8)[0][1:]
        assert nll is not None
        assert kl is not None
        weighed, kl = arguments.weighed(factor, kl, spec.kl)
        outputs = (nll + weighed, nll.detach(), kl.detach())
    else:
        outputs = autograd.call(autograd.LinearElbo, chosen, spec, inputs)
    return outputs if return_terms else outputs[0]
