"""Ops that are a sequence of other ops, for either backend: sample, decode in a linear layer, weigh, and the KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .dtypes import accumulate_dtype
from .specs import Gradients, Latent, LatentInputs, LinearElbo, LinearElboInputs, LinearInputs, ListOp, Needs, Op


def each(latent: Op) -> ListOp:
    """z and kl of each of a list, by an op for one."""

    def forward(inputs: Sequence[LatentInputs], specs: Sequence[Latent], needs: Sequence[Needs]) -> tuple[Any, Any]:
        done = [latent.forward(*one) for one in zip(inputs, specs, needs, strict=True)]
        return [output for outputs, _ in done for output in outputs], [kept for _, kept in done]

    def backward(
        inputs: Sequence[LatentInputs], specs: Sequence[Latent], grads: Sequence[Gradients], needs: Sequence[Needs], kept: Any
    ) -> list[Gradients]:
        kept = [None] * len(inputs) if kept is None else kept
        found: list[Gradients] = []
        for one, spec, grad, need, own in zip(inputs, specs, grads, needs, kept, strict=True):
            is_owed = True in need and not (grad[0] is None and grad[1] is None)
            found.append(latent.backward(one, spec, grad, need, own) if is_owed else (None,) * 4)
        return found

    return ListOp(forward, backward)


def linear_elbo(latent: Op, linear_nll: Op) -> Op:
    """nll(x; z weight^T + bias) + beta * kl of a sample z, by an op for z and the KL and an op for the likelihood.

    What the likelihood keeps for its backward pass (its gradients, for a total) is kept here, with the z that it belongs to. The
    gradients of mu and logvar are left to the backward pass, which knows the upstream gradient: a float16 one would underflow.
    """

    def forward(inputs: LinearElboInputs, spec: LinearElbo, needs: Needs) -> tuple[tuple[Tensor, ...], Any]:
        (z, kl), _ = latent.forward(inputs.latent, _latent_spec(spec), (False,) * 4)
        (nll,), ready = linear_nll.forward(_decoded(inputs, spec, z), spec.linear, _split(needs)[0])
        assert nll is not None
        assert kl is not None
        if spec.linear.likelihood.keep and spec.num_samples is not None:
            nll = nll.view(spec.num_samples, -1).sum(0)
        loss = nll + spec.beta * kl
        return (loss, nll, kl) if spec.return_terms else (loss,), None if ready is None else (z, ready)

    def backward(inputs: LinearElboInputs, spec: LinearElbo, grad_outputs: Gradients, needs: Needs, kept: Any) -> Gradients:
        grad_loss = grad_outputs[0]
        assert grad_loss is not None
        of_nll, of_latent = _split(needs)
        z: Any
        z, ready = (None, None) if kept is None else kept
        d_z = None
        d_nll: Gradients = (None,) * 5
        if any(of_nll):
            if z is None:
                sample = _latent_spec(spec)._replace(want_kl=False)
                (z, _), _ = latent.forward(inputs.latent, sample, (False,) * 4)
            decoded = _decoded(inputs, spec, z)
            grad_nll = grad_loss.to(accumulate_dtype(*decoded))
            if spec.linear.likelihood.keep and spec.num_samples is not None:
                grad_nll = grad_nll.repeat(spec.num_samples)
            d_nll = linear_nll.backward(decoded, spec.linear, (grad_nll,), of_nll, ready)
            d_z = None if d_nll[0] is None else d_nll[0].view(z.shape)
        d_posterior: Gradients = (None,) * 4
        if any(of_latent):
            grad_kl = (grad_loss * spec.beta).to(accumulate_dtype(*inputs.latent[:4]))
            d_posterior = latent.backward(inputs.latent, _latent_spec(spec), (d_z, grad_kl), of_latent, None)
        (_, d_x, *d_layer), (d_mu, d_logvar, *d_prior) = d_nll, d_posterior
        return d_x, d_mu, d_logvar, *d_layer, *d_prior

    return Op(forward, backward)


def _latent_spec(spec: LinearElbo) -> Latent:
    return Latent(spec.kl, True, spec.num_samples)


def _decoded(inputs: LinearElboInputs, spec: LinearElbo, z: Any) -> LinearInputs:
    """What the linear layer takes: the samples of z one below the other."""
    return inputs.linear(z if spec.num_samples is None else z.flatten(0, 1))


def _split(needs: Needs) -> tuple[Needs, Needs]:
    """Which gradients the likelihood owes, in the order of `LinearInputs`, and which the sample and the KL owe."""
    need_x, need_mu, need_logvar, *of_layer, need_prior_mu, need_prior_logvar = needs
    return (need_mu or need_logvar, need_x, *of_layer), (need_mu, need_logvar, need_prior_mu, need_prior_logvar)
