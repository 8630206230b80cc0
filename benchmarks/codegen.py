"""Compile every kernel ahead of time for real GPUs, without one: registers, spills, vector width, and what its loops cost.

    python -m benchmarks.codegen [--target sm_90 ...] [--width 32 ...] [--part K N] [--json FILE] [--budget]

The calls below go through the package's own host code; what it would launch is compiled instead. Exit status 1 if a kernel spills,
if an elementwise kernel reads or writes dense float32 tensors in less than 16 bytes, if a kernel takes more shared memory than its
targets have, if one that should multiply matrices in matrix instructions has none, or if one is above its budget: the instructions
of an element and the registers on sm_90 that budget.json holds, which `--budget` writes anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

if os.environ.pop("TRITON_INTERPRET", None):
    # Triton reads it at its first import, and an interpreted kernel has nothing to compile.
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.codegen", *sys.argv[1:]])

import torch
import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource

try:
    from triton._C.libtriton import native_specialize_impl
except ImportError as error:
    raise SystemExit(f"benchmarks.codegen needs Triton 3.6 or newer, found {triton.__version__}") from error

import fastelbo
from benchmarks.assembly import CLASSES, Loop, accesses, in_flight, inspect_cuda, inspect_hip, loops_of, matrix_instructions
from fastelbo import backend, kernels
from fastelbo.kernels import launch as launch_module
from fastelbo.kernels.tile import Block
from fastelbo.specs import KL, Likelihood, Linear, LinearElbo, LinearElboInputs, LinearInputs

# Bytes of shared memory of a program on the least of its architecture (of CUDA: 8.6, 8.9 and 12).
SHARED = {"cuda": 99 * 1024, "hip": 64 * 1024}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Kernels that walk dense tensors; the others (sums of partials) are not elementwise.
# A dense operand that is read or written element by element costs a thread 16 accesses; scalars, partial sums and what broadcasts
# along a row come to a handful.
SCALARS = 8
ELEMENTWISE = ("nll_kernel", "latent_kernel", "latents_kernel", "elbo_kernel")
PRODUCTS = ("rows_kernel", "columns_kernel")
WIDTHS = (16, 32, 64, 128)
BUDGET_FILE = Path(__file__).parent / "budget.json"
BUDGET: dict[str, dict[str, float]] = json.loads(BUDGET_FILE.read_text())
HEADROOM = 1.05  # for another version of a compiler


@dataclass
class Report:
    case: str
    kernel: str
    target: str
    registers: int
    spills: int
    wide: int  # 16-byte global accesses
    narrow: int  # narrower ones
    loops: list[Loop]  # over tiles, of an elementwise kernel on NVIDIA's targets
    in_flight: float  # on sm_90, bytes that a multiprocessor has under way over those that it needs; 0 where there is no loop
    matrix: str | None  # which matrix instructions
    problems: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.case}: {self.kernel}"

    @property
    def cost(self) -> dict[str, float]:
        """What the budget limits."""
        return {"instructions": round(max(loop.instructions for loop in self.loops), 1), "registers": self.registers}


def cases() -> Iterator[tuple[str, bool, Callable[[], Any]]]:
    """(name, whether every access to a tensor must be 16 bytes wide, call)."""

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_()

    def elbo(dtype: torch.dtype, *, weight: Any = None, clamp: Any = None, d: int = 768, j: int = 32, **options: Any) -> Any:
        inputs = [randn(64, d, dtype=dtype), torch.zeros(64, d, dtype=dtype), randn(64, j, dtype=dtype), randn(64, j, dtype=dtype)]
        return fastelbo.elbo_loss(*inputs, weight=weight, logvar_clamp=clamp, **options)

    def latent(dtype: torch.dtype, shape: tuple[int, ...] = (64, 32), **options: Any) -> Any:
        return fastelbo.reparameterize_kl(randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), **options)

    def backward(outputs: Any) -> None:
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    def groups(lists: int) -> list[list[torch.Tensor]]:
        return [[randn(16, 16, width) for width in (4, 64, 256)] for _ in range(lists)]

    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    yield "elbo_loss, fixed variance", True, lambda: backward(elbo(f32))
    yield "elbo_loss, learned variance", True, lambda: backward(elbo(f32, recon_logvar=randn(64, 768)))
    yield "elbo_loss, learned, bf16", False, lambda: backward(elbo(bf16, recon_logvar=randn(64, 768, dtype=bf16)))
    yield "elbo_loss, learned, fp16", False, lambda: backward(elbo(f16, recon_logvar=randn(64, 768, dtype=f16)))
    yield "elbo_loss, scalar variance", True, lambda: backward(elbo(f32, recon_logvar=randn()))
    yield "elbo_loss, per-dimension variance", True, lambda: backward(elbo(f32, recon_logvar=randn(768)))
    yield "elbo_loss, float weights, clamp", True, lambda: backward(elbo(f32, weight=torch.zeros(64, 768), clamp=(-30.0, 20.0)))
    yield "elbo_loss, mask", False, lambda: backward(elbo(f32, weight=torch.zeros(64, 768, dtype=torch.bool)))
    yield "elbo_loss, odd sizes", False, lambda: backward(elbo(f32, d=785, j=21, recon_logvar=randn(64, 785)))
    yield "elbo_loss, float64", False, lambda: backward(elbo(f64, recon_logvar=randn(64, 768, dtype=f64)))
    yield "elbo_loss, per sample", True, lambda: backward(elbo(f32, recon_logvar=randn(64, 768), reduction="none"))
    yield (
        "elbo_loss, Laplace, learned scale",
        True,
        lambda: backward(elbo(f32, likelihood="laplace", recon_logscale=randn(64, 768))),
    )
    yield "elbo_loss, Laplace, fixed scale", True, lambda: backward(elbo(f32, likelihood="laplace", recon_logscale=-1.0))
    yield "elbo_loss, Bernoulli", True, lambda: backward(elbo(f32, likelihood="bernoulli"))
    yield "elbo_loss, Bernoulli, float64", False, lambda: backward(elbo(f64, likelihood="bernoulli"))
    for dtype, title in ((f32, ""), (f64, ", float64")):
        mean, theta = (lambda d=dtype: randn(64, 768, dtype=d) for _ in range(2))
        x, wide = torch.zeros(64, 768, dtype=dtype), dtype == f32
        yield f"poisson_nll{title}", wide, lambda m=mean, x=x: backward(fastelbo.poisson_nll(m(), x))
        yield (
            f"negative_binomial_nll{title}",
            wide,
            lambda m=mean, x=x, t=theta: backward(fastelbo.negative_binomial_nll(m(), x, theta=t())),
        )
        yield (
            f"zero_inflated_negative_binomial_nll{title}",
            wide,
            lambda m=mean, x=x: backward(fastelbo.zero_inflated_negative_binomial_nll(m(), x, theta=m(), zi_logits=m())),
        )
    yield (
        "negative_binomial_nll, theta per gene",
        True,
        lambda: backward(fastelbo.negative_binomial_nll(randn(64, 768), torch.zeros(64, 768), theta=randn(768), reduction="sum")),
    )
    image = torch.zeros(64, 768, dtype=torch.uint8)

    def bins(dtype: torch.dtype, logscale: Any, x: torch.Tensor, **options: Any) -> Any:
        return fastelbo.discretized_logistic_nll(randn(64, 768, dtype=dtype), x, logscale=logscale, reduction="sum", **options)

    yield "discretized_logistic_nll, learned scale", True, lambda: backward(bins(f32, randn(64, 768), torch.zeros(64, 768)))
    yield "discretized_logistic_nll, fixed scale", True, lambda: backward(bins(f32, -5.0, torch.zeros(64, 768)))
    yield (
        "discretized_logistic_nll, per channel, image",
        False,
        lambda: backward(bins(f32, randn(768), image, x_scale=1 / 127.5, x_shift=-1)),
    )
    yield (
        "discretized_logistic_nll, float64",
        False,
        lambda: backward(bins(f64, randn(64, 768, dtype=f64), torch.zeros(64, 768, dtype=f64))),
    )
    yield "gaussian_nll, image", False, lambda: backward(fastelbo.gaussian_nll(randn(64, 768), image, x_scale=1 / 255))
    yield (
        "gaussian_nll, std",
        True,
        lambda: backward(fastelbo.gaussian_nll(randn(64, 768), torch.zeros(64, 768), std=randn(64, 768), reduction="sum")),
    )
    yield (
        "gaussian_nll, var, elementwise",
        True,
        lambda: backward(fastelbo.gaussian_nll(randn(64, 768), torch.zeros(64, 768), var=randn(64, 768), batch_dims=2)),
    )
    yield (
        "gaussian_nll, per-channel variance",
        True,
        lambda: backward(
            fastelbo.gaussian_nll(randn(8, 3, 64, 64), torch.zeros(8, 3, 64, 64), logvar=randn(3, 1, 1), reduction="mean")
        ),
    )
    yield (
        "gaussian_kl, learned prior",
        True,
        lambda: backward(fastelbo.gaussian_kl(randn(64, 32), randn(64, 32), randn(64, 32), randn(64, 32))),
    )
    for form in ("logstd", "std", "var"):
        yield (
            f"gaussian_kl, {form}, learned prior",
            True,
            lambda form=form: backward(
                fastelbo.gaussian_kl(randn(64, 32), prior_mu=randn(64, 32), **{form: randn(64, 32), f"prior_{form}": randn(64, 32)})
            ),
        )
        yield (
            f"reparameterize_kl, {form}, seed",
            True,
            lambda form=form: backward(fastelbo.reparameterize_kl(randn(64, 32), **{form: randn(64, 32)}, seed=1)),
        )
    yield "reparameterize_kl, seed", True, lambda: backward(latent(f32, seed=1))
    yield "reparameterize_kl, seed, bf16", False, lambda: backward(latent(bf16, seed=1))
    yield "reparameterize_kl, eps", True, lambda: backward(latent(f32, eps=torch.zeros(64, 32)))
    yield "reparameterize_kl, 4 samples", True, lambda: backward(latent(f32, seed=1, num_samples=4))
    yield "reparameterize_kl, odd latents", False, lambda: backward(latent(f32, (64, 21), seed=1))
    yield "reparameterize_kl, odd sizes", False, lambda: backward(latent(f32, (63, 21), seed=1, num_samples=3))
    yield (
        "foreach_reparameterize_kl, 3 groups",
        False,  # each group has its own few scalars
        lambda: backward([t for each in fastelbo.foreach_reparameterize_kl(*groups(4), seed=1) for t in each]),
    )
    yield "packed moments", True, lambda: backward(fastelbo.DiagonalGaussian.from_moments(randn(4, 8, 32, 32)).rsample_kl(seed=1))


def linear_cases(widths: list[int]) -> Iterator[tuple[str, bool, Callable[[], Any]]]:
    """(name, whether its products are to run in matrix instructions, call), for decoder inputs of these widths."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    batch, cols = 2048, 1024

    def layer(dtype: torch.dtype, width: int) -> tuple[Any, ...]:
        return tuple(torch.zeros(shape, dtype=dtype) for shape in ((batch, cols), (cols, width), (cols,), (cols,)))

    def of_layer(dtype: torch.dtype, width: int, precision: str | None, samples: int = 1, gradients: bool = True) -> Any:
        """A backward with an upstream gradient for each row; without gradients, a forward."""
        x, weight, bias, variance = layer(dtype, width)
        h = torch.zeros(samples * batch, width, dtype=dtype)
        if not gradients:
            spec = Linear(Likelihood(), precision)
            return kernels.linear_nll.forward(LinearInputs(h, x, weight, bias, None), spec, (False,) * 5)
        needs = samples == 1, True, True, True, True  # of several samples only the gradients that are summed over them
        inputs, spec = LinearInputs(h, x, weight, bias, variance), Linear(Likelihood(keep=1), precision)
        return kernels.linear_nll.backward(inputs, spec, (torch.ones(len(h)),), needs, None)

    def elbo(dtype: torch.dtype, width: int, precision: str | None, prior: bool = True, keep: int = 0, given: bool = False) -> Any:
        """A forward with gradients, or where these are recomputed, a backward."""
        x, weight, bias, variance = layer(dtype, width)
        mu = torch.zeros(batch, width, dtype=dtype)
        noise = (mu, None) if given else (None, torch.zeros((), dtype=torch.int64))
        inputs = LinearElboInputs(x, mu, mu, weight, bias, variance, *((mu, mu) if prior else (None, None)), *noise)
        spec = LinearElbo(Linear(Likelihood(keep), precision), KL(keep))
        needs = False, True, True, True, True, True, prior, prior
        if keep or dtype == f16:
            grad_loss = torch.ones(batch) if keep else torch.ones(())
            return kernels.linear_elbo.backward(inputs, spec, (grad_loss,), needs, None)
        return kernels.linear_elbo.forward(inputs, spec, needs)

    kinds = (bf16, None), (f32, "tf32"), (f32, "tf32x3"), (f32, "ieee")
    for width in widths:
        for dtype, precision in kinds:
            kind, strict = precision or "bf16", precision != "ieee"
            yield f"linear {width}, {kind}", strict, lambda d=dtype, w=width, p=precision: of_layer(d, w, p)
            yield f"linear ELBO {width}, {kind}, prior", strict, lambda d=dtype, w=width, p=precision: elbo(d, w, p)
            # Simpler kernels than those above, but compilers lift more out of a simpler loop, and have spilled for it.
            if width == 128:
                yield f"linear {width}, {kind}, 3 samples", strict, lambda d=dtype, w=width, p=precision: of_layer(d, w, p, 3)
                yield f"linear {width}, {kind}, forward", strict, lambda d=dtype, w=width, p=precision: of_layer(d, w, p, 1, False)
                yield f"linear ELBO {width}, {kind}", strict, lambda d=dtype, w=width, p=precision: elbo(d, w, p, False)
                yield (
                    f"linear ELBO {width}, {kind}, eps",
                    strict,
                    lambda d=dtype, w=width, p=precision: elbo(d, w, p, False, 0, True),
                )
    # Rows that start anywhere, and the widest float16.
    yield "linear ELBO 10, bf16, per row", True, lambda: elbo(bf16, 10, None, keep=1)
    yield "linear ELBO 10, tf32, per row", True, lambda: elbo(f32, 10, "tf32", keep=1)
    yield "linear ELBO 128, fp16", True, lambda: elbo(f16, 128, None)


def launches(call: Callable[[], Any], target: str = "cuda") -> list[tuple[Any, tuple[Any, ...], dict[str, int] | None]]:
    """What a call would launch on one of Triton's backends: (kernel, arguments, compiler options of its own)."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, int] | None]] = []
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (launch_module, "start", lambda kernel, programs, args, tuned=None: found.append((kernel, args, tuned))),
            (launch_module, "backend", lambda: target),
            # Beneath `choose` and `choose_linear`, so that what the kernels cannot serve goes elsewhere here too.
            (backend, "_pick", lambda impl, device, empty: backend.triton_backend()),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        call()
    return found


def source(kernel: Any, args: tuple[Any, ...]) -> ASTSource:
    """The kernel as the launcher would specialise it for these arguments."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}

    def visit(path: tuple[int, ...], value: Any, kind: Any, key: Any) -> Any:
        if isinstance(kind, tuple):
            inner = [visit((*path, i), v, k, s) for i, (v, k, s) in enumerate(zip(value, kind, key, strict=True))]
            # A record keeps the names of its fields.
            return type(kind)._make(inner) if hasattr(kind, "_fields") else tuple(inner)
        if kind == "constexpr":
            constants[path] = value
        elif key == "D":
            attrs[path] = [["tt.divisibility", 16]]
        return kind

    for i, (param, value) in enumerate(zip(kernel.params, args, strict=True)):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[(i,)] = value
        else:
            kind, key = native_specialize_impl(BaseBackend, value, False, not param.do_not_specialize, True)
            signature[param.name] = visit((i,), value, kind, key)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)


def compiled(kernel: Any, args: tuple[Any, ...], tuned: dict[str, int] | None, name: str) -> tuple[Any, ...]:
    """(registers, spilled bytes, instructions, assembly, threads of a program, bytes of its shared memory) on a target."""
    target = TARGETS[name]
    options = launch_module.options(target.backend, target.arch if target.backend == "cuda" else 0, tuned)
    binary = triton.compile(source(kernel, args), target=target, options=options)
    if binary.hash not in inspected:  # what sums up or scales is the same in most cases
        inspected[binary.hash] = (inspect_cuda if target.backend == "cuda" else inspect_hip)(binary)
    return *inspected[binary.hash], options["num_warps"] * target.warp_size, binary.metadata.shared


inspected: dict[str, tuple[int, int, list[str], str]] = {}


def tile_of(args: Any) -> int:
    """Elements of a tile, as the launch's own record says; 0 where it has none."""
    if isinstance(args, Block):
        return args.BM * args.BN
    return max(map(tile_of, args), default=0) if isinstance(args, tuple) else 0


def reports(targets: list[str], widths: list[int], part: tuple[int, int] = (0, 1)) -> Iterator[Report]:
    """`part` (k, n) is every n-th of the cases, from the k-th on."""
    seen = set()
    everything = [(*c, False) for c in cases()] + [(*c, True) for c in linear_cases(widths)]
    for case, strict, call, linear in everything[part[0] :: part[1]]:
        for name in targets:
            for kernel, args, tuned in launches(call, TARGETS[name].backend):
                title = kernel.__name__
                if linear:
                    # The kernels of a linear decoder come in fewer variants than their cases, and take longest to compile.
                    spec = source(kernel, args)
                    key = name, title, str(spec.signature), str(spec.constants), str(spec.attrs), str(tuned)
                    if key in seen:
                        continue
                    seen.add(key)
                registers, spills, code, text, threads, shared = compiled(kernel, args, tuned, name)
                wide, narrow = accesses(code, TARGETS[name].backend)
                found, flight = [], 0.0
                if title in ELEMENTWISE and TARGETS[name].backend == "cuda":
                    found = loops_of(text, tile_of(args) / threads)
                    if name == "sm_90":
                        flight = min(in_flight(registers, threads, tile_of(args) * loop.read) for loop in found)
                matrix = matrix_instructions(code) if title in PRODUCTS else None
                report = Report(case, title, name, registers, spills, wide, narrow, found, flight, matrix)
                limit = BUDGET.get(report.key) if name == "sm_90" and found else None
                if limit:
                    over = {what: n for what, n in report.cost.items() if n > limit[what] * HEADROOM}
                    report.problems += [f"{n:g} {what}, where the budget is {limit[what]:g}" for what, n in over.items()]
                if spills:
                    report.problems.append(f"spills {spills} bytes")
                if strict and title in ELEMENTWISE and narrow > SCALARS:
                    report.problems.append(f"{narrow} accesses of less than 16 bytes")
                if shared > SHARED[TARGETS[name].backend]:
                    report.problems.append(f"{shared} bytes of shared memory")
                if strict and matrix == "none":
                    report.problems.append("no matrix instructions")
                yield report


def tables(found: list[Report]) -> Iterator[Any]:
    from rich.table import Table

    table = Table(title=f"fastelbo {fastelbo.__version__}, Triton {triton.__version__}")
    for heading in ("case", "kernel", "target"):
        table.add_column(heading)
    for heading in ("registers", "spills", "16-byte", "narrower", "matrix"):
        table.add_column(heading, justify="right")
    for r in found:
        figures = (str(r.registers), str(r.spills), str(r.wide), str(r.narrow), r.matrix or "")
        table.add_row(r.case, r.kernel, r.target, *figures, style="red" if r.problems else None)
    yield table

    table = Table(
        title="Of an element, in the loops over tiles on sm_90, and elements a second of an H100 by each floor",
        caption="in flight: bytes under way on a multiprocessor, over those that hide its memory's latency",
    )
    for heading in ("case", "kernel"):
        table.add_column(heading)
    for heading in (*CLASSES, "other", "instructions", "bytes", "issue, G/s", "memory, G/s", "binds", "in flight"):
        table.add_column(heading, justify="right")
    for r in found:
        for loop in r.loops if r.target == "sm_90" else ():
            classes = (f"{loop.classes.get(kind, 0):.1f}" for kind in (*CLASSES, "other"))
            rates = (f"{rate / 1e9:.0f}" for rate in loop.rates)
            figures = (*classes, f"{loop.instructions:.1f}", f"{loop.bytes:.1f}", *rates, loop.bound, f"{r.in_flight:.1f}")
            table.add_row(r.case, r.kernel, *figures)
    yield table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs to compile for")
    parser.add_argument("--width", nargs="*", type=int, choices=WIDTHS, default=list(WIDTHS), help="of a linear decoder's input")
    parser.add_argument("--part", nargs=2, type=int, default=[0, 1], metavar=("K", "N"), help="every N-th case, from the K-th on")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--budget", action="store_true", help="write what was found on sm_90 to budget.json")
    options = parser.parse_args(argv)
    from rich.console import Console

    found = []
    console = Console(width=None if sys.stdout.isatty() else 190)
    with console.status("compiling") as status:
        for r in reports(options.target, options.width, tuple(options.part)):
            status.update(f"compiling: {r.case}, {r.kernel}, {r.target}")
            found.append(r)
    for table in tables(found):
        console.print(table)
    for r in found:
        for problem in r.problems:
            console.print(f"[red]{r.case}, {r.kernel}, {r.target}: {problem}")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(r) for r in found], indent=1))
    if options.budget:
        costs: dict[str, dict[str, float]] = {}
        for r in found:
            if r.loops and r.target == "sm_90":
                before = costs.get(r.key, r.cost)  # of a forward and a backward pass the larger
                costs[r.key] = {what: max(n, before[what]) for what, n in r.cost.items()}
        BUDGET_FILE.write_text(json.dumps(costs, indent=1) + "\n")
    return 1 if any(r.problems for r in found) else 0


if __name__ == "__main__":
    sys.exit(main())
