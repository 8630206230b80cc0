"""The functions as modules, for code that builds its losses once. What they hold is checked when they are built."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arguments, backend, checks
from .drop_in import gaussian_nll_loss
from .dtypes import plain
from .functional import elbo_loss
from .latent import reparameterize
from .linear import check_layer, linear_elbo_loss
from .noise import check_seed
from .tracing import NUMBER
from .types import Clamp, Family, Impl, Int, Number, Precision, Reduction, Seed


def _check_loss(reduction: Any, impl: Any, **flags: Any) -> None:
    checks.kept_dims(reduction, 0, 0)
    backend.check(impl)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _checked_samples(num_samples: Any) -> int | None:
    num_samples = plain(num_samples)
    if num_samples is not None:
        checks.samples(num_samples)
    return num_samples


def _checked_beta(beta: Any) -> Tensor | float:
    beta = plain(beta)
    checks.factor("beta", beta, beta.device if isinstance(beta, Tensor) else torch.device("cpu"), 1)
    if isinstance(beta, Tensor) and beta.requires_grad:
        raise ValueError("beta requires grad, but a module holds it as a buffer: give a learned beta at the call")
    return beta


def _hold_spread(module: nn.Module, name: str, value: Any, learned: bool, **factory: Any) -> None:
    """Make the spread of a likelihood a parameter (None starts at 0), a buffer or a plain attribute of the module."""
    value = plain(value)
    if value is not None:
        checks.variance(name, "logvar", value, value)
    if isinstance(value, nn.Parameter):
        setattr(module, name, value)
    elif learned:
        start = value if isinstance(value, Tensor) else torch.tensor(float(value or 0.0), **factory)
        setattr(module, name, nn.Parameter(start.detach().clone()))
    elif isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{name} requires grad, but no optimizer would see it: make it an nn.Parameter, or set learned=True")
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def _keep_missing(module: nn.Module, name: str, state_dict: dict[str, Any], prefix: str) -> None:
    """Let a state_dict without this buffer load: one of an older version, or of a module that did without."""
    held = getattr(module, name)
    if held is not None:
        state_dict.setdefault(prefix + name, held)


class _HoldsBeta(nn.Module):
    """A buffer `beta`, 0-d and at least float32, which an assignment writes to."""

    if TYPE_CHECKING:

        @property
        def beta(self) -> Tensor: ...

        @beta.setter
        def beta(self, value: Tensor | Number) -> None: ...

    def _hold_beta(self, beta: Any, device: Any = None, dtype: torch.dtype | None = None) -> None:
        beta = _checked_beta(beta)
        own = beta.dtype if isinstance(beta, Tensor) else dtype or torch.get_default_dtype()
        own = torch.promote_types(own, torch.float32)
        if isinstance(beta, Tensor):
            held = beta.reshape(()).to(device=device, dtype=own, copy=True)
        else:
            held = torch.tensor(beta, dtype=own, device=device)
        self.register_buffer("beta", held)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "beta":
            super().__setattr__(name, value)
            return
        value = _checked_beta(value)
        if self.beta.is_meta and isinstance(value, Tensor):  # load_state_dict(assign=True)
            self._hold_beta(value)
            return
        # In place, where compiled code and captured CUDA graphs look for it.
        if isinstance(value, Tensor):
            self.beta.copy_(value.reshape(()))
        else:
            self.beta.fill_(value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.beta
        super()._apply(fn, recurse)
        if self.beta.dtype.itemsize < 4:
            # half() and bfloat16() would round the weight of the KL, which costs nothing to keep.
            self._buffers["beta"] = before.to(self.beta.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _keep_missing(self, "beta", state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _shown_beta(self) -> str:
        return "beta=..." if self.beta.is_meta else f"beta={self.beta:g}"


def _shown(name: str, spread: Tensor | Number | str | None) -> str:
    return "" if spread is None else f", {name}={getattr(spread, 'shape', spread)}"


def _scattered(seed: int) -> int:
    """The key of the first call. Calls count up from it, so keys of neighbouring seeds must lie far apart; below 2**62 they cannot
    overflow.
    """
    return int.from_bytes(hashlib.sha256((seed % 2**64).to_bytes(8, "little")).digest()[:8], "little") >> 2


class GaussianNLLLoss(nn.Module):
    """Drop-in for `torch.nn.GaussianNLLLoss`; see `fastelbo.gaussian_nll_loss`.

    Raises:
        TypeError, ValueError: eps is not a number or is negative, or reduction is unknown.
    """

    def __init__(self, *, full: bool = False, eps: Number = 1e-6, reduction: Literal["none", "mean", "sum"] = "mean") -> None:
        super().__init__()
        eps = plain(eps)
        if isinstance(eps, bool) or not isinstance(eps, NUMBER):
            raise TypeError(f"eps must be a number, got {type(eps).__name__}")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"{reduction} is not valid")  # as the function says it, and torch
        self.full, self.eps, self.reduction = full, float(eps), reduction

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        """The loss of `fastelbo.gaussian_nll_loss`."""
        return gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"full={self.full}, eps={self.eps}, reduction={self.reduction!r}"


class Reparameterize(nn.Module):
    """Samples z ~ N(mu, exp(logvar)); in eval mode returns mu, the mode, as most VAE code does. See `fastelbo.reparameterize`.

    With `seed` every call in training mode has noise of its own, and the same seed gives the same sequence of it. A buffer counts
    the calls, so that a run resumed from a state_dict, by a module of the same seed, goes on with the noise it would have had.
    Modules of different seeds draw different noise: give each module of a model its own seed, and each process of a parallel run.

    Args:
        num_samples: As in `fastelbo.reparameterize`.
        seed: None for noise as `fastelbo.reparameterize` draws it, or an int or a 0-d int64 tensor, whose value is read here.
        impl: As in `fastelbo.reparameterize`.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value.
    """

    counter: Tensor | None

    def __init__(self, num_samples: Int | None = None, *, seed: Seed | None = None, impl: Impl | None = None) -> None:
        super().__init__()
        backend.check(impl)
        self.num_samples, self.impl = _checked_samples(num_samples), impl
        self.seed = None if seed is None else int(check_seed(seed, seed.device if isinstance(seed, Tensor) else "cpu"))
        self._first_key = 0 if self.seed is None else _scattered(self.seed)
        self.register_buffer("counter", None if seed is None else torch.zeros((), dtype=torch.int64, device=None))

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        eps: Tensor | None = None,
        seed: Seed | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """z; `eps`, `seed` or `generator` give the noise of this call, and then the module's own sequence does not advance.

        Raises:
            RuntimeError: The module's sequence is asked for in a backward pass, as by `torch.utils.checkpoint`, which would get
                other noise than forward had; or, by torch, in a `torch.func.grad`, which must not count. Give the noise at the call
                there.
            TypeError, ValueError: As `fastelbo.reparameterize`.
        """
        if not self.training:
            return mu if self.num_samples is None else mu.expand(self.num_samples, *mu.shape)
        if self.counter is None or eps is not None or seed is not None or generator is not None:
            return reparameterize(mu, logvar, self.num_samples, eps=eps, seed=seed, generator=generator, impl=self.impl)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "Reparameterize(seed=...) was called in a backward pass, as torch.utils.checkpoint does to compute a forward pass "
                "again, and its next noise is not that of the first time: give seed= or eps= at the call"
            )
        z = reparameterize(mu, logvar, self.num_samples, seed=self.counter + self._first_key, impl=self.impl)
        self.counter.add_(1)
        return z

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _keep_missing(self, "counter", state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}" + ("" if self.seed is None else f", seed={self.seed}")


class ELBOLoss(_HoldsBeta):
    """`fastelbo.elbo_loss` that holds beta, the reduction and the likelihood's log-variance.

    Args:
        beta: Weight of the KL: a number or a tensor of one value. It is a buffer, which is in the state_dict and moves with the
            module, in float32 (float64 if the tensor or torch's default dtype is) even where the module is in half precision.
            `loss.beta = ...` writes a number or such a tensor to it: nothing compiles again, and a captured CUDA graph of a module
            on the GPU sees it.
        likelihood: As in `fastelbo.elbo_loss`.
        recon_logvar, recon_logscale: The spread of a Gaussian or a Laplace likelihood: None (0), a number, or a tensor that
            broadcasts to recon. An `nn.Parameter` is shared, so that an optimizer of this module trains it. A Gaussian's may be
            "optimal".
        learned: Make a parameter of it that starts there; None starts at 0.
        full, logvar_clamp, x_scale, x_shift, reduction, return_terms, impl: As in `fastelbo.elbo_loss`.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value.
    """

    recon_logvar: Tensor | Number | Literal["optimal"] | None
    recon_logscale: Tensor | Number | None

    def __init__(
        self,
        beta: Tensor | Number = 1.0,
        *,
        likelihood: Family = "gaussian",
        recon_logvar: Tensor | Number | Literal["optimal"] | None = None,
        recon_logscale: Tensor | Number | None = None,
        learned: bool = False,
        full: bool = True,
        logvar_clamp: Clamp | None = None,
        x_scale: Number | None = None,
        x_shift: Number | None = None,
        reduction: Reduction = "batchmean",
        return_terms: bool = False,
        impl: Impl | None = None,
    ) -> None:
        super().__init__()
        _check_loss(reduction, impl, learned=learned, full=full, return_terms=return_terms)
        if logvar_clamp is not None:
            checks.clamp(logvar_clamp)
        if x_scale is not None or x_shift is not None:
            checks.image_numbers(x_scale, x_shift)
        self.x_scale, self.x_shift = x_scale, x_shift
        self._hold_beta(beta)
        self.full, self.logvar_clamp, self.reduction = full, logvar_clamp, reduction
        self.return_terms, self.impl = return_terms, impl
        name, spread = arguments.spread_of(likelihood, recon_logvar, recon_logscale)
        if learned and (likelihood == "bernoulli" or isinstance(spread, str)):
            raise ValueError(f"learned=True, but likelihood={likelihood!r} has no {name} to learn, got {spread!r}")
        self.likelihood: Family = likelihood
        setattr(self, "recon_logvar" if name == "recon_logscale" else "recon_logscale", None)
        if isinstance(spread, str) and spread == "optimal":
            self.recon_logvar = "optimal"
        else:
            _hold_spread(self, name, spread, learned)

    def forward(
        self,
        recon: Tensor,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        *,
        beta: Tensor | Number | None = None,
        recon_logvar: Tensor | Number | None = None,
        recon_logscale: Tensor | Number | None = None,
        prior_mu: Tensor | Number | None = None,
        prior_logvar: Tensor | Number | None = None,
        weight: Tensor | None = None,
        kl_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss. `beta`, if given, takes the place of the module's for this call, and may be learned or one for each sample.

        A decoder's own `recon_logvar` or `recon_logscale` takes the place of the module's, which must then be None.
        """
        for name, given in (("recon_logvar", recon_logvar), ("recon_logscale", recon_logscale)):
            if given is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, but this ELBOLoss holds one: build it with {name}=None")
        return elbo_loss(
            recon, x, mu, logvar, likelihood=self.likelihood,
            recon_logvar=self.recon_logvar if recon_logvar is None else recon_logvar,
            recon_logscale=self.recon_logscale if recon_logscale is None else recon_logscale, prior_mu=prior_mu,
            prior_logvar=prior_logvar, beta=self.beta if beta is None else beta, full=self.full,
            logvar_clamp=self.logvar_clamp, weight=weight, kl_weight=kl_weight, x_scale=self.x_scale, x_shift=self.x_shift,
            reduction=self.reduction, return_terms=self.return_terms, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        image = "" if self.x_scale is None else f", x_scale={self.x_scale:g}, x_shift={self.x_shift or 0:g}"
        family = "" if self.likelihood == "gaussian" else f", likelihood={self.likelihood!r}"
        spreads = _shown("recon_logvar", self.recon_logvar) + _shown("recon_logscale", self.recon_logscale)
        return f"{self._shown_beta()}, reduction={self.reduction!r}{family}{spreads}{image}"


class LinearELBO(_HoldsBeta, nn.Linear):
    """A linear decoder and its loss in one: `fastelbo.linear_elbo_loss` that holds weight, bias and what `ELBOLoss` holds.

    A `torch.nn.Linear(latents, elements)` in its parameters and their initialisation, and a state_dict of one loads.

    Args:
        latents, elements: Sizes of z and of x, per sample.
        bias: Whether the layer has one.
        num_samples, precision: As in `fastelbo.linear_elbo_loss`.
        beta, recon_logvar, learned, full, reduction, return_terms, impl: As in `ELBOLoss`.

    Raises:
        TypeError, ValueError: An argument has the wrong type, value or shape.
    """

    recon_logvar: Tensor | Number | None

    def __init__(
        self,
        latents: int,
        elements: int,
        bias: bool = True,
        *,
        beta: Tensor | Number = 1.0,
        recon_logvar: Tensor | Number | None = None,
        learned: bool = False,
        num_samples: Int | None = None,
        full: bool = True,
        reduction: Reduction = "batchmean",
        return_terms: bool = False,
        precision: Precision | None = None,
        impl: Impl | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(latents, elements, bias, device, dtype)
        _check_loss(reduction, impl, learned=learned, full=full, return_terms=return_terms)
        self._hold_beta(beta, device, dtype)
        self.num_samples, self.full, self.reduction = _checked_samples(num_samples), full, reduction
        self.return_terms, self.precision, self.impl = return_terms, precision, impl
        _hold_spread(self, "recon_logvar", recon_logvar, learned, device=device, dtype=dtype)
        # As for an empty batch. Shapes are known here, while devices may still change.
        x, of_layer, spread = (
            t.to("meta") if isinstance(t, Tensor) else t
            for t in (self.weight.new_empty((0, elements)), self.weight, self.recon_logvar)
        )
        check_layer(x, of_layer, None, spread, "recon_logvar", precision)

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction of z `(..., latents)`, for what is not the loss: `(..., elements)`."""
        return F.linear(z, self.weight, self.bias)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        *,
        beta: Tensor | Number | None = None,
        prior_mu: Tensor | Number | None = None,
        prior_logvar: Tensor | Number | None = None,
        eps: Tensor | None = None,
        seed: Seed | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of x `(batch, elements)` under the posterior N(mu, exp(logvar)), `(batch, latents)`.

        `beta`, if given, takes the place of the module's for this call, and may be learned or one for each sample. In a training
        loop a `seed` must change from step to step.
        """
        return linear_elbo_loss(
            x, mu, logvar, self.weight, self.bias, recon_logvar=self.recon_logvar, prior_mu=prior_mu, prior_logvar=prior_logvar,
            beta=self.beta if beta is None else beta, num_samples=self.num_samples, eps=eps, seed=seed, generator=generator,
            full=self.full, reduction=self.reduction, return_terms=self.return_terms, precision=self.precision, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, {self._shown_beta()}, reduction={self.reduction!r}{_shown('recon_logvar', self.recon_logvar)}"
        )
