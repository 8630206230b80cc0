"""One `autograd.Function` per fused op. Nothing here knows which backend serves it: an `Op` is a forward and a backward.

Three rules hold for all of them.

- `needs_input_grad` decides which gradients are computed. It stays true under `no_grad`, so `call` looks at the grad mode first and
  leaves the Function out where nothing will be differentiated.
- What a forward pass keeps for its backward (gradients that are ready, for instance) is handed over once and forgotten. Every later
  backward starts from the saved inputs. No tensor that a caller can see is written again.
- What a custom backward cannot serve goes through the reference expression: transforms of torch.func, forward-mode
  differentiation, subclasses that wrap tensors (DTensor), and backward with grad mode on (`create_graph=True`), so that double
  backward is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .specs import (
    DIFFERENTIABLE,
    Backend,
    ElboInputs,
    LatentInputs,
    LinearElboInputs,
    LinearInputs,
    ListOp,
    NLLInputs,
    Op,
)
from .specs import Latent as LatentSpec
from .tracing import are_batched, are_wrapped, is_transformed

Outputs = tuple[Tensor | None, ...]


def _is_differentiated(grad_outputs: Sequence[Tensor]) -> bool:
    """Whether this backward is itself differentiated or batched. A traced one never is (and Dynamo traces with grad mode on)."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or is_transformed() or are_batched(grad_outputs)


def _differentiate(
    expression: Callable[..., Outputs], inputs: Sequence[Any], needs: Sequence[bool], grad_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of the outputs of `expression(*inputs)` in the first `len(needs)` inputs."""
    # A view each: the same tensor may stand in two places, and each place wants its own gradient.
    graded = torch.is_grad_enabled()  # otherwise the gradients are only batched
    with torch.enable_grad():
        own = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=False)]
        outputs = expression(*own, *inputs[len(needs) :])
    pairs = [(out, g) for out, g in zip(outputs, grad_outputs, strict=True) if g is not None and out is not None]
    pairs = [(out, g) for out, g in pairs if out.requires_grad]  # a term may depend on none of them
    if not pairs:
        return (None,) * len(needs)
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [t for t, need in zip(own, needs, strict=True) if need],
        [g for _, g in pairs],
        create_graph=graded,
        allow_unused=True,
    )
    each = iter(found)
    return tuple(next(each) if need else None for need in needs)


class _Fused(Function):
    """`apply(op, spec, *inputs)`: the outputs of `op.forward`, with the gradients of `op.backward`."""

    op: str  # the field of `Backend`
    inputs: type[Any]  # the record of the inputs
    differentiable_outputs = 2  # at most; outputs after these are for logging
    expression: Callable[[Any, Any], Outputs]  # what create_graph=True differentiates, and impl="reference" is

    @classmethod
    def forward(cls, ctx: Any, op: Op, spec: Any, *tensors: Tensor | None) -> Outputs:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.op, ctx.spec = cls, op, spec
        ctx.set_materialize_grads(False)
        inputs = cls.inputs(*tensors)
        outputs, ctx.kept = op.forward(inputs, spec, ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE[cls.inputs]])
        if len(outputs) > cls.differentiable_outputs:
            ctx.mark_non_differentiable(*outputs[cls.differentiable_outputs :])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        cls: type[_Fused] = ctx.function  # compiled autograd takes no class method
        kept, ctx.kept = ctx.kept, None
        inputs = cls.inputs(*ctx.saved_tensors)
        needs = ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE[cls.inputs]]
        rest = (None,) * (len(inputs) - len(needs))
        given = [g for g in grad_outputs if g is not None]
        if not given:
            return None, None, *(None,) * len(needs), *rest
        if _is_differentiated(given):
            expression = lambda *tensors: cls.expression(cls.inputs(*tensors), ctx.spec)  # noqa: E731
            return None, None, *_differentiate(expression, inputs, needs, grad_outputs), *rest
        return None, None, *ctx.op.backward(inputs, ctx.spec, grad_outputs, needs, kept), *rest


class NLL(_Fused):
    op, inputs, expression = "likelihood", NLLInputs, staticmethod(reference.likelihood)


class Latent(_Fused):
    op, inputs, expression = "latent", LatentInputs, staticmethod(reference.latent)


class Elbo(_Fused):
    op, inputs, expression = "elbo", ElboInputs, staticmethod(reference.elbo)
    differentiable_outputs = 1


class ElboTerms(_Fused):
    op, inputs, expression = "elbo_terms", ElboInputs, staticmethod(reference.elbo_terms)


class LinearNLL(_Fused):
    op, inputs, expression = "linear_nll", LinearInputs, staticmethod(reference.linear_nll)


class LinearElbo(_Fused):
    op, inputs, expression = "linear_elbo", LinearElboInputs, staticmethod(reference.linear_elbo)
    differentiable_outputs = 1


class PackedLatent(Function):
    """As `Latent` for mu and logvar that are the halves of `moments` along `dim`: they get one packed gradient."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, spec: LatentSpec, dim: int, moments: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None,
        weight: Tensor | None, eps: Tensor | None, seed: Tensor | None,
    ) -> Outputs:  # fmt: skip
        ctx.save_for_backward(moments, prior_mu, prior_logvar, weight, eps, seed)
        ctx.op, ctx.spec, ctx.dim = op, spec, dim
        ctx.set_materialize_grads(False)
        mu, logvar = moments.chunk(2, dim)
        inputs = LatentInputs(mu, logvar, prior_mu, prior_logvar, weight, eps, seed)
        need, *of_prior = ctx.needs_input_grad[3:6]
        outputs, ctx.kept = op.forward(inputs, spec, (need, need, *of_prior))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        kept, ctx.kept = ctx.kept, None
        moments, *others = ctx.saved_tensors
        _, _, _, need, need_prior_mu, need_prior_logvar, *_ = ctx.needs_input_grad
        given = [g for g in grad_outputs if g is not None]
        if not given:
            return (None,) * 9
        grads: Outputs
        if _is_differentiated(given):

            def expression(moments: Tensor, *others: Tensor | None) -> Outputs:
                return reference.latent(LatentInputs(*moments.chunk(2, ctx.dim), *others), ctx.spec)

            wanted = need, need_prior_mu, need_prior_logvar
            grads = _differentiate(expression, (moments, *others), wanted, grad_outputs)
        else:
            packed = torch.empty_like(moments) if need else None
            halves = None if packed is None else packed.chunk(2, ctx.dim)
            inputs, needs = LatentInputs(*moments.chunk(2, ctx.dim), *others), (need, need, need_prior_mu, need_prior_logvar)
            _, _, *of_prior = ctx.op.backward(inputs, ctx.spec, grad_outputs, needs, kept, out=halves)
            grads = packed, *of_prior
        return None, None, None, *grads, None, None, None


class Latents(Function):
    """As `Latent` for a list of inputs and of records, in one node: z and kl of the first, of the second, and so on."""

    @staticmethod
    def forward(ctx: Any, op: ListOp, specs: Sequence[LatentSpec], *tensors: Tensor | None) -> Outputs:
        ctx.save_for_backward(*tensors)
        ctx.op, ctx.specs = op, specs
        ctx.set_materialize_grads(False)
        needs = [of_one[:4] for of_one in _by_call(ctx.needs_input_grad[2:])]
        outputs, ctx.kept = op.forward([LatentInputs(*own) for own in _by_call(tensors)], specs, needs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        kept, ctx.kept = ctx.kept, None
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        given = [g for g in grad_outputs if g is not None]
        if not given:
            return None, None, *(None,) * len(tensors)
        if _is_differentiated(given):

            def expression(*tensors: Tensor | None) -> Outputs:
                pairs = zip(_by_call(tensors), ctx.specs, strict=True)
                outputs = [reference.latent(LatentInputs(*own), spec) for own, spec in pairs]
                return tuple([output for of_one in outputs for output in of_one])

            return None, None, *_differentiate(expression, tensors, needs, grad_outputs)
        grads = list(zip(grad_outputs[::2], grad_outputs[1::2], strict=True))
        inputs, of_each = [LatentInputs(*own) for own in _by_call(tensors)], [of_one[:4] for of_one in _by_call(needs)]
        found = ctx.op.backward(inputs, ctx.specs, grads, of_each, kept)
        return None, None, *[g for of_one in found for g in (*of_one, None, None, None)]


def _by_call(flat: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What belongs to each `LatentInputs` of a list, of what belongs to all their fields."""
    size = len(LatentInputs._fields)
    return [tuple(flat[i : i + size]) for i in range(0, len(flat), size)]


def call(function: type[_Fused], backend: Backend | None, spec: Any, inputs: Any) -> Any:
    """The outputs of an op, as one backend computes them; None stands for the reference."""
    if backend is None or is_transformed() or are_wrapped(inputs):
        return function.expression(inputs, spec)
    op = getattr(backend, function.op)
    count = DIFFERENTIABLE[function.inputs]
    if not _needs_gradient(inputs[:count]):
        return op.forward(inputs, spec, (False,) * count)[0]
    return function.apply(op, spec, *inputs)


def call_packed(backend: Backend, spec: LatentSpec, dim: int, moments: Tensor, inputs: LatentInputs) -> Any:
    """As `call` of `Latent`, where mu and logvar are the halves of `moments` along `dim`."""
    if is_transformed() or are_wrapped((moments, *inputs[2:])):
        return reference.latent(inputs, spec)
    op = backend.latent
    if not _needs_gradient((moments, *inputs[2:4])):
        return op.forward(inputs, spec, (False,) * 4)[0]
    return PackedLatent.apply(op, spec, dim, moments, *inputs[2:])


def call_list(backend: Backend, specs: Sequence[LatentSpec], inputs: Sequence[LatentInputs]) -> Any:
    """z and kl of each call of a list, in turn. What only the reference serves is not for this: see `call`."""
    op, flat = backend.latents, [t for own in inputs for t in own]
    if not _needs_gradient(flat):
        return op.forward(inputs, specs, [(False,) * 4] * len(inputs))[0]
    return Latents.apply(op, specs, *flat)


def _needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and True in [t is not None and t.requires_grad for t in tensors]
