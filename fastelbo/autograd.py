"""One `autograd.Function` per fused op. Nothing here knows which backend serves it: `backend` is `eager` or `fastelbo.kernels`.

Four rules hold for all of them.

- Where a backend has gradients ready from the forward pass, the first backward scales them, hands them over and forgets them: for
  `ELBO`, `LinearELBO` and `LinearNLL` both backends do, since their upstream gradient is 1 in normal use, for the others only where
  recomputing costs more than keeping. Any other backward recomputes from the saved inputs. Nothing a caller sees is written.
- With grad mode on inside backward (`create_graph=True`), the reference expression is differentiated instead, so that double
  backward is right.
- `needs_input_grad` decides which gradients are computed. It stays true under `no_grad`, so work that only a backward would use
  also asks for the grad mode of the call (`track`).
- What is no tensor travels in one tuple, `options`: each argument of `apply` costs host time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .noise import sample_noise

Outputs = Sequence[Tensor | None]


def _is_differentiated() -> bool:
    """Whether this backward will itself be differentiated. A traced backward never is (and Dynamo traces with grad mode on)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _differentiate(
    expression: Callable[..., Outputs], inputs: Sequence[Any], needs: Sequence[bool], grads: Outputs
) -> list[Tensor | None]:
    """Differentiable gradients of the outputs of `expression(*inputs)`."""
    # A view each: the same tensor may stand in two places, and each place wants its own gradient.
    own = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
    pairs = [(out, g) for out, g in zip(expression(*own), grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [t for t, need in zip(own, needs, strict=True) if need],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    each = iter(found)
    return [next(each) if need else None for need in needs]


class GaussianNLL(Function):
    """Scaled sums of -log N(x; recon, var) over all but `keep` dimensions.

    `options`: (kind, full, eps, keep, scale, track, backend).
    """

    @staticmethod
    def forward(ctx: Any, recon: Tensor, x: Tensor, var: Tensor | float, weight: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(recon, x, var if isinstance(var, Tensor) else None, weight)
        ctx.fixed = None if isinstance(var, Tensor) else var
        kind, full, eps, keep, scale, track, backend = ctx.options = options
        needs = ctx.needs_input_grad[:3] if track else (False,) * 3
        nll, ctx.ready = backend.nll_forward(recon, x, var, weight, kind, full, eps, keep, scale, needs)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ready, ctx.ready = ctx.ready, None
        kind, full, eps, keep, scale, _track, backend = ctx.options
        if ready is not None and not _is_differentiated():
            return *backend.scale_gradients(ready, grad), None, None
        recon, x, var, weight = ctx.saved_tensors
        var = var if ctx.fixed is None else ctx.fixed
        needs = ctx.needs_input_grad[:3]
        if _is_differentiated():

            def expression(recon: Tensor, x: Tensor, var: Tensor | float) -> Outputs:
                return [scale * reference.nll(recon, x, var, weight, kind, full, eps, keep)]

            grads = _differentiate(expression, (recon, x, var), needs, [grad])
        else:
            grads = backend.nll_backward(recon, x, var, weight, kind, eps, keep, scale, grad, needs)
        return *grads, None, None


class Latent(Function):
    """z, a sample of N(mu, exp(logvar)), and the scaled sums of the KL over all but `keep` dimensions; either may be None.

    With `packed` (a dimension), `mu` holds the moments, mu and logvar as its halves along it, and gets one packed gradient.
    `options`: (clamp, keep, scale, samples, want_kl, packed, track, backend).
    """

    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, logvar: Tensor | None, prior_mu: Tensor | None, prior_logvar: Tensor | None, weight: Tensor | None,
        eps: Tensor | None, seed: Tensor | None, options: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        ctx.save_for_backward(mu, logvar, prior_mu, prior_logvar, weight, eps, seed)
        clamp, keep, scale, samples, want_kl, packed, track, backend = ctx.options = options
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[:4] if track else (False,) * 4
        if packed is not None:
            mu, logvar = mu.chunk(2, packed)
            needs = (False,) * 4  # the two halves of one gradient are written at once, in backward
        z, kl, ctx.ready = backend.latent_forward(
            mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, want_kl, needs
        )
        return z, kl

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> Any:
        ready, ctx.ready = ctx.ready, None
        clamp, keep, scale, samples, _want_kl, packed, _track, backend = ctx.options
        needs = ctx.needs_input_grad[:4]
        if grad_z is None and grad_kl is None:
            return (None,) * 8
        if ready is not None and not _is_differentiated():
            return *backend.scale_gradients(ready, grad_kl), *(None,) * 4
        mu, logvar, prior_mu, prior_logvar, weight, eps, seed = ctx.saved_tensors
        if _is_differentiated():

            def expression(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Outputs:
                if packed is not None:
                    mu, logvar = mu.chunk(2, packed)
                z = kl = None
                if grad_z is not None:
                    noise = eps if seed is None else sample_noise(mu, seed, samples)
                    z = reference.sample(mu, logvar, noise, clamp)
                if grad_kl is not None:
                    kl = scale * reference.kl(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep)
                return [z, kl]

            grads = _differentiate(expression, (mu, logvar, prior_mu, prior_logvar), needs, [grad_z, grad_kl])
        elif packed is not None:
            grad = torch.empty_like(mu) if needs[0] else None
            _, _, *of_prior = backend.latent_backward(
                *mu.chunk(2, packed), prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, grad_z, grad_kl,
                (needs[0], needs[0], *needs[2:]), out=None if grad is None else grad.chunk(2, packed),
            )  # fmt: skip
            grads = [grad, None, *of_prior]
        else:
            grads = backend.latent_backward(
                mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, grad_z, grad_kl, needs
            )
        return *grads, *(None,) * 4


class ELBOTerms(Function):
    """The scaled sums of the likelihood and KL terms over all but `keep` dimensions, each with its own upstream gradient.

    `options`: (full, clamp, keep, nll_scale, kl_scale, track, backend).
    """

    @staticmethod
    def forward(
        ctx: Any, recon: Tensor, x: Tensor, var: Tensor | float, mu: Tensor, logvar: Tensor,
        prior_mu: Tensor | None, prior_logvar: Tensor | None, weight: Tensor | None, options: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        _save_elbo(ctx, recon, x, var, mu, logvar, prior_mu, prior_logvar, weight)
        full, clamp, keep, nll_scale, kl_scale, track, backend = ctx.options = options
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[:7] if track else (False,) * 7
        nll, kl, ctx.ready = backend.elbo_terms_forward(
            recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, full, clamp, keep, nll_scale, kl_scale, needs
        )
        return nll, kl

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor | None, grad_kl: Tensor | None) -> Any:
        ready, ctx.ready = ctx.ready, None
        full, clamp, keep, nll_scale, kl_scale, _track, backend = ctx.options
        if ready is not None and not _is_differentiated():
            of_nll, of_kl = backend.scale_gradients(ready[:3], grad_nll), backend.scale_gradients(ready[3:], grad_kl)
            return *of_nll, *of_kl, None, None
        return *_elbo_backward(ctx, grad_nll, grad_kl, full, clamp, keep, nll_scale, kl_scale, backend), None, None


class ELBO(Function):
    """loss = nll_scale * sum nll + beta * kl_scale * sum kl, with its gradients written in the pass that reads the inputs.

    `options`: (full, clamp, nll_scale, kl_scale, beta, terms, track, backend). Outputs cost host time, so the two terms come with
    the loss only where they are asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, recon: Tensor, x: Tensor, var: Tensor | float, mu: Tensor, logvar: Tensor,
        prior_mu: Tensor | None, prior_logvar: Tensor | None, weight: Tensor | None, options: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        _save_elbo(ctx, recon, x, var, mu, logvar, prior_mu, prior_logvar, weight)
        full, clamp, nll_scale, kl_scale, beta, terms, track, backend = ctx.options = options
        ctx.set_materialize_grads(False)
        inputs: Any = (recon, x, var, mu, logvar, prior_mu, prior_logvar)
        # A float16 gradient written before GradScaler's factor is known, and already divided by the batch, would underflow.
        ready = track and torch.float16 not in [t.dtype for t in inputs if isinstance(t, Tensor)]
        now = ctx.needs_input_grad[:7] if ready else (False,) * 7
        loss, nll, kl, grads = backend.elbo_forward(*inputs, weight, full, clamp, nll_scale, kl_scale, beta, now)
        ctx.ready = grads if ready else None
        if not terms:
            return loss
        nll, kl = torch.as_tensor(nll, dtype=loss.dtype), torch.as_tensor(kl, dtype=loss.dtype)
        ctx.mark_non_differentiable(nll, kl)
        return loss, nll, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        ready, ctx.ready = ctx.ready, None
        if grad is None:
            return (None,) * 9
        full, clamp, nll_scale, kl_scale, beta, _terms, _track, backend = ctx.options
        if ready is not None and not _is_differentiated():
            return *backend.scale_gradients(ready, grad), None, None
        if isinstance(beta, Tensor):
            beta = beta.to(grad.dtype)  # a product with a half-precision beta would be rounded to its dtype
        grads = _elbo_backward(ctx, grad, grad, full, clamp, 0, nll_scale, kl_scale * beta, backend)
        return *grads, None, None


class LinearNLL(Function):
    """As `GaussianNLL` for recon = h weight^T + bias, which is never in memory, and a log-variance.

    h `(N, H)` may have several rows for each of x `(B, D)`: row n goes with row n % B.
    `options`: (full, keep, scale, precision, track, backend).
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, var: Tensor | float, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(h, x, weight, bias, var if isinstance(var, Tensor) else None)
        ctx.fixed = None if isinstance(var, Tensor) else var
        full, keep, scale, precision, track, backend = ctx.options = options
        needs = ctx.needs_input_grad[:5] if track else (False,) * 5
        nll, ctx.ready = backend.linear_nll_forward(h, x, weight, bias, var, full, keep, scale, precision, needs)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ready, ctx.ready = ctx.ready, None
        full, keep, scale, precision, _track, backend = ctx.options
        if ready is not None and not _is_differentiated():
            return *backend.scale_gradients(ready, grad), None
        h, x, weight, bias, var = ctx.saved_tensors
        inputs = h, x, weight, bias, var if ctx.fixed is None else ctx.fixed
        needs = ctx.needs_input_grad[:5]
        if _is_differentiated():

            def expression(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, var: Tensor | float) -> Outputs:
                return [scale * reference.linear_nll(h, x, weight, bias, var, full, keep)]

            grads = _differentiate(expression, inputs, needs, [grad])
        else:
            grads = backend.linear_nll_backward(*inputs, keep, scale, grad, precision, needs)
        return *grads, None


class LinearELBO(Function):
    """loss = scaled sums of nll + beta * scaled sums of kl over all but `keep` dimensions, across a linear decoder of a sample.

    `options`: (samples, full, keep, nll_scale, kl_scale, beta, precision, terms, track, backend).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor, bias: Tensor | None, var: Tensor | float,
        prior_mu: Tensor | None, prior_logvar: Tensor | None, eps: Tensor | None, seed: Tensor | None, options: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        fixed = None if isinstance(var, Tensor) else var
        ctx.save_for_backward(x, mu, logvar, weight, bias, var if fixed is None else None, prior_mu, prior_logvar, eps, seed)
        ctx.fixed = fixed
        *rest, terms, track, backend = ctx.options = options
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[:8] if track else (False,) * 8
        loss, nll, kl, ctx.ready = backend.linear_elbo_forward(
            x, mu, logvar, weight, bias, var, prior_mu, prior_logvar, eps, seed, *rest, needs
        )
        if not terms:
            return loss
        ctx.mark_non_differentiable(nll, kl)
        return loss, nll, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        ready, ctx.ready = ctx.ready, None
        if grad is None:
            return (None,) * 11
        samples, full, keep, nll_scale, kl_scale, beta, precision, _terms, _track, backend = ctx.options
        if ready is not None and not _is_differentiated():
            return *backend.scale_gradients(ready, grad), *(None,) * 3
        *inputs, eps, seed = ctx.saved_tensors
        if ctx.fixed is not None:
            inputs[5] = ctx.fixed
        needs = ctx.needs_input_grad[:8]
        if _is_differentiated():

            def expression(x, mu, logvar, weight, bias, var, prior_mu, prior_logvar) -> Outputs:
                z = reference.sample(mu, logvar, eps if seed is None else sample_noise(mu, seed, samples), None)
                rows = z if samples is None else z.flatten(0, 1)
                nll = nll_scale * reference.linear_nll(rows, x, weight, bias, var, full, keep)
                if keep and samples is not None:
                    nll = nll.view(samples, -1).sum(0)
                kl = kl_scale * reference.kl(mu, logvar, prior_mu, prior_logvar, None, None, keep)
                return [nll + beta * kl]

            grads = _differentiate(expression, inputs, needs, [grad])
        else:
            grads = backend.linear_elbo_backward(
                *inputs, eps, seed, samples, keep, nll_scale, kl_scale, beta, grad, precision, needs
            )
        return *grads, *(None,) * 3


def _save_elbo(ctx: Any, recon, x, var, mu, logvar, prior_mu, prior_logvar, weight) -> None:
    ctx.save_for_backward(recon, x, var if isinstance(var, Tensor) else None, mu, logvar, prior_mu, prior_logvar, weight)
    ctx.fixed = None if isinstance(var, Tensor) else var


def _elbo_backward(
    ctx: Any, grad_nll: Tensor | None, grad_kl: Tensor | None, full: bool, clamp: tuple[float, float] | None, keep: int,
    nll_scale: float | Tensor, kl_scale: float | Tensor, backend: ModuleType,
) -> Any:  # fmt: skip
    """Gradients of both terms from the saved inputs."""
    recon, x, var, mu, logvar, prior_mu, prior_logvar, weight = ctx.saved_tensors
    var = var if ctx.fixed is None else ctx.fixed
    needs = ctx.needs_input_grad[:7]
    inputs = recon, x, var, mu, logvar, prior_mu, prior_logvar
    if _is_differentiated():

        def expression(recon, x, var, mu, logvar, prior_mu, prior_logvar) -> Outputs:
            nll = nll_scale * reference.nll(recon, x, var, weight, "logvar", full, 0.0, keep)
            kl = kl_scale * reference.kl(mu, logvar, prior_mu, prior_logvar, None, clamp, keep)
            return [nll, kl]

        return _differentiate(expression, inputs, needs, [grad_nll, grad_kl])
    return backend.elbo_terms_backward(*inputs, weight, clamp, keep, nll_scale, kl_scale, grad_nll, grad_kl, needs)
