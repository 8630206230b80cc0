"""`fastelbo demo`, `fastelbo compare` and `fastelbo info`; `python -m fastelbo` is the same."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastelbo

from . import backend

# The modules that the extras bring, and the names under which pip knows them.
DEMO_NEEDS = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


class Refused(Exception):
    """What the user can mend: it is told in one line, without a traceback, and the exit status is 2."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastelbo", description="The loss of a variational autoencoder as fused kernels.")
    parser.add_argument("--version", action="version", version=f"fastelbo {fastelbo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small VAE on real digits with the usual loss and with fastelbo, and compare")
    demo.set_defaults(run=run_demo)
    add = demo.add_argument
    add("--epochs", type=int, default=400, metavar="N", help="passes over the training digits (default 400)")
    add("--seed", type=int, default=0, metavar="S", help="seed of weights, split and noise (default 0)")
    add("--out", type=Path, default="results/demo", metavar="DIR", help="where the picture goes (default results/demo)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")

    compare = commands.add_parser("compare", help="hold fused and eager numerics against the float64 truth")
    compare.set_defaults(run=run_compare)
    add = compare.add_argument
    add("--op", metavar="NAME", help="one function, or one way to call it such as gaussian_kl/prior (default all)")
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 or float64 (default all)")
    add(
        "--shape", metavar="N,...", help="of every tensor, batch first, such as 64,784 (default a few); of a linear layer that of x"
    )
    add("--logvar-range", nargs=2, type=float, metavar=("LO", "HI"), help="of log-variances, less the prior's (default three)")
    add("--seed", type=int, default=0, metavar="S", help="seed of inputs and upstream gradients (default 0)")
    add("--tensors", type=Path, metavar="FILE.pt", help="your own, a dict by argument name, as torch.save writes it")
    add("--json", type=Path, metavar="FILE", help="write every figure")
    add("--plot", type=Path, metavar="FILE", help="draw the errors against the log-variance")

    info = commands.add_parser("info", help="print versions, devices, and which backend serves what, and why")
    info.set_defaults(run=run_info)
    info.add_argument("--json", action="store_true", help="print JSON")

    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except Refused as error:
        print(f"fastelbo: {error}", file=sys.stderr)
        return 2


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def need(what: str, extra: str, *modules: str) -> None:
    missing = [DEMO_NEEDS[module] for module in modules if not is_installed(module)]
    if missing:
        raise Refused(f'{what} needs {", ".join(missing)}: pip install "fastelbo[{extra}]"')


def run_demo(args: argparse.Namespace) -> int:
    need("the demo", "demo", *DEMO_NEEDS)
    from . import demo

    try:
        return demo.run(args.epochs, args.seed, args.out, args.device)
    except (ValueError, OSError) as error:
        raise Refused(error) from error


def run_compare(args: argparse.Namespace) -> int:
    try:
        check_outputs(args.json, args.plot)
        shape = None if args.shape is None else parse_shape(args.shape)
        if args.plot:
            need("--plot", "demo", "matplotlib")
            check_picture(args.plot)
        from .numerics.compare import load, plan, run
        from .numerics.report import plot

        tensors = None if args.tensors is None else load(args.tensors)
        cases: Iterable[Any] = plan(args.op, args.dtype, shape, args.logvar_range, args.seed, tensors)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise Refused(str(error).splitlines()[0]) from error

    if is_installed("rich"):
        from rich.console import Console
        from rich.progress import track

        console = Console(highlight=False, width=100)
        result = run(track(cases, "comparing", console=console, transient=True, disable=not console.is_terminal), args.seed)
        console.print(result)
        console.print(str(result), style=None if result.ok else "bold red", markup=False, soft_wrap=True)
    else:
        result = run(cases, args.seed)
        print(result.table(), result, sep="\n\n")
    try:
        if args.json:
            args.json.write_text(result.to_json())
        if args.plot:
            plot(result.rows, args.plot)
    except (OSError, ValueError) as error:
        raise Refused(error) from error
    return 0 if result.ok else 1


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise ValueError(f"shape must be numbers with commas between them, such as 64,784, got {text!r}") from None


def check_outputs(figures: Path | None, picture: Path | None) -> None:
    """Fail before the work and not after it."""
    for path in filter(None, (figures, picture)):
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}")


def check_picture(path: Path) -> None:
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"cannot draw {path}: its name must end in one of {', '.join(sorted(known))}")


def run_info(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    # Plain text: this command needs no extra.
    for name, version in facts["versions"].items():
        print(f"{name:<10}{version}")
    for device in facts["devices"]:
        print(f"{device['device']:<10}{describe(device)}")
    print("\nWhich backend serves what, and why:")
    for row in facts["backends"]:
        print(f"{row['calls']:<29}{row['backend']:<11}{row['why']}")
    return 0


def collect() -> dict[str, Any]:
    """Everything that `fastelbo info` prints, as JSON can hold it."""
    return {"versions": versions(), "devices": devices(), "backends": backends()}


def versions() -> dict[str, str]:
    try:
        # From the metadata: importing triton takes a second and may fail where its driver does.
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}" if torch.version.hip else "CPU only"
    return {
        "fastelbo": fastelbo.__version__,
        "torch": f"{torch.__version__} ({built})",
        "triton": triton,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        of = torch.cuda.get_device_properties(index)
        entry = {"device": f"cuda:{index}", "name": of.name, "memory_gib": round(of.total_memory / 2**30, 1)}
        if torch.version.hip:
            entry["capability"] = getattr(of, "gcnArchName", "unknown")
        else:
            entry |= {"capability": f"{of.major}.{of.minor}", "driver": nvidia_driver()}
        found.append(entry)
    return found


def describe(device: dict[str, Any]) -> str:
    if device["device"] == "cpu":
        return f"{device['name']}, {device['cores']} cores, torch uses {device['threads']} threads"
    driver = f", driver {device['driver']}" if "driver" in device else ""
    return f"{device['name']}, {device['memory_gib']} GiB, capability {device['capability']}{driver}"


def cpu_name() -> str:
    linux = Path("/proc/cpuinfo")
    for line in linux.read_text().splitlines() if linux.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def nvidia_driver() -> str:
    """Torch knows the CUDA version that the driver supports, not the driver's own."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi is missing or failed)"
    return answer.split("\n")[0].strip() or "unknown"


def backends() -> list[dict[str, str]]:
    """Which backend serves which calls, asked of `backend.choose` itself wherever it can be, and the reason."""
    found: dict[str, tuple[str, str]] = {}
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        own = traced = chosen(None, device)
        if backend.DEFAULT in backend.IMPLS and backend.DEFAULT != "reference":
            # A trace cannot be entered from here; this is what `choose` does in one.
            traced = "torch", "Inductor fuses plain expressions itself"
        found[f"{device} tensors"] = found[f"{device} tensors, float64"] = own
        found[f"{device} tensors, torch.compile"] = traced
        found[f"{device} tensors, impl='triton'"] = chosen("triton", device)

    where = "in Triton's interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "natively, on GPU tensors"
    automatic = "Triton for GPU tensors, plain PyTorch otherwise"
    settings = {
        "TRITON_INTERPRET": f"kernels run {where}",
        "FASTELBO_IMPL": automatic if backend.DEFAULT == "auto" else "the default of calls without impl=",
    }
    found |= {name: (os.environ.get(name) or "unset", why) for name, why in settings.items()}
    return [{"calls": calls, "backend": served, "why": why} for calls, (served, why) in found.items()]


def chosen(impl: str | None, device: str) -> tuple[str, str]:
    """The backend's name for a call, and why it is that one; or "none", and what the call would raise."""
    try:
        module = backend.choose(impl, torch.device(device))
    except Exception as error:  # a broken triton raises what it likes, and finding that out is what this command is for
        return "none", str(error) or type(error).__name__
    served = "reference" if module is None else "torch" if module is backend.EAGER else "triton"
    if impl == "triton":
        return served, "asked for" if device == "cuda" else "asked for, in Triton's interpreter: slow, for tests"
    if backend.DEFAULT != "auto":
        return served, "forced by FASTELBO_IMPL"
    if device == "cpu":
        return served, "not a GPU: plain PyTorch, analytic gradients"
    return served, f"GPU tensors, {'and triton is' if served == 'triton' else 'but triton is not'} installed"
