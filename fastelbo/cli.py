"""`fastelbo demo`, `fastelbo compare` and `fastelbo info`; `python -m fastelbo` is the same."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastelbo

from . import backend

DEMO_NEEDS = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
TABLE_WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastelbo", description="The loss of a variational autoencoder as fused kernels.")
    parser.add_argument("--version", action="version", version=f"fastelbo {fastelbo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small VAE on real digits with the usual loss and with fastelbo, and compare")
    demo.add_argument("--epochs", type=int, default=400, metavar="N", help="passes over the training digits (default 400)")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, split and noise (default 0)")
    demo.add_argument(
        "--out", type=Path, default=Path("results/demo"), metavar="DIR", help="where the picture goes (default results/demo)"
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    demo.set_defaults(run=run_demo)

    compare = commands.add_parser("compare", help="hold fused and eager numerics against the float64 truth")
    compare.add_argument("--op", metavar="NAME", help="one function, or one way to call it such as gaussian_kl/prior (default all)")
    compare.add_argument("--dtype", metavar="NAME", help="float32, bfloat16, float16 or float64 (default all)")
    compare.add_argument(
        "--shape", metavar="N,...",
        help="shape of every tensor, batch first, such as 64,784 (default a few); of a linear layer that of x, as a matrix",
    )  # fmt: skip
    compare.add_argument(
        "--logvar-range", nargs=2, type=float, metavar=("LO", "HI"),
        help="of log-variances, less the prior's (default near the prior, wide, extreme)",
    )  # fmt: skip
    compare.add_argument("--seed", type=int, default=0, metavar="S", help="seed of inputs and upstream gradients (default 0)")
    compare.add_argument(
        "--tensors", type=Path, metavar="FILE.pt", help="your own tensors, a dict by argument name, as torch.save writes it"
    )
    compare.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors against the log-variance")
    compare.set_defaults(run=run_compare)

    info = commands.add_parser("info", help="print versions, devices, and which backend serves what, and why")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run_info)

    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


def fail(message: str) -> int:
    print(f"fastelbo: {message}", file=sys.stderr)
    return 2


# ---- demo ------------------------------------------------------------------------------------------------------------------------


def run_demo(args: argparse.Namespace) -> int:
    missing = [name for module, name in DEMO_NEEDS.items() if not is_installed(module)]
    if missing:
        return fail(f'the demo needs {", ".join(missing)}: pip install "fastelbo[demo]"')
    from . import demo

    try:
        return demo.run(epochs=args.epochs, seed=args.seed, out=args.out, device=args.device)
    except (ValueError, OSError) as error:
        return fail(str(error))


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# ---- compare ---------------------------------------------------------------------------------------------------------------------


def run_compare(args: argparse.Namespace) -> int:
    if not is_installed("rich"):
        return fail('compare needs rich: pip install "fastelbo[cli]"')
    if args.plot and not is_installed("matplotlib"):
        return fail('--plot needs matplotlib: pip install "fastelbo[demo]"')
    from rich.console import Console
    from rich.progress import track

    from .numerics.compare import load, plan, run
    from .numerics.report import plot

    try:
        for path in filter(None, (args.json, args.plot)):
            check_output(path)
        if args.plot:
            check_picture(args.plot)
        shape = None if args.shape is None else parse_shape(args.shape)
        tensors = None if args.tensors is None else load(args.tensors)
        cases = plan(args.op, args.dtype, shape, args.logvar_range, args.seed, tensors)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return fail(str(error).splitlines()[0])

    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    watched = track(cases, "comparing", console=console, transient=True, disable=not console.is_terminal)
    result = run(watched, args.seed)
    console.print(result)
    console.print(str(result), style=None if result.ok else "bold red", markup=False, soft_wrap=True)
    try:
        if args.json:
            args.json.write_text(result.to_json())
        if args.plot:
            plot(result.rows, args.plot)
    except (OSError, ValueError) as error:
        return fail(str(error))
    return 0 if result.ok else 1


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise ValueError(f"shape must be numbers with commas between them, such as 64,784, got {text!r}") from None


def check_output(path: Path) -> None:
    """Fail before the work and not after it."""
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")


def check_picture(path: Path) -> None:
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"cannot draw {path}: its name must end in one of {', '.join(sorted(known))}")


# ---- info ------------------------------------------------------------------------------------------------------------------------


def run_info(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    elif is_installed("rich"):
        print_rich(facts)
    else:
        print_plain(facts)
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
    built = torch.version.cuda or torch.version.hip
    kind = f"CUDA {built}" if torch.version.cuda else f"HIP {built}" if built else "CPU only"
    return {
        "fastelbo": fastelbo.__version__,
        "torch": f"{torch.__version__} ({kind})",
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


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def nvidia_driver() -> str:
    # torch knows the CUDA version that the driver supports, not the driver's own.
    if not (tool := shutil.which("nvidia-smi")):
        return "unknown (no nvidia-smi)"
    try:
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi failed)"
    return answer.stdout.split("\n")[0].strip() or "unknown"


def backends() -> list[dict[str, str]]:
    """Which backend serves which calls, asked of `backend.choose` itself wherever it can be, and the reason."""
    rows = []

    def add(calls: str, served: str, why: str) -> None:
        rows.append({"calls": calls, "backend": served, "why": why})

    default = backend.DEFAULT
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        served, problem = chosen(None, device)
        add(f"{device} tensors", served, problem or because(served, device))
        add(f"{device} tensors, float64", served, problem or "as above, in float64 throughout")
        # A trace cannot be entered from here; this is what choose does in one.
        if default == "reference" or default not in backend.IMPLS:
            add(f"{device} tensors, torch.compile", served, problem or because(served, device))
        else:
            add(f"{device} tensors, torch.compile", "torch", "Inductor fuses plain expressions itself")
        served, problem = chosen("triton", device)
        native = "asked for" if device == "cuda" else "asked for, in Triton's interpreter: slow, for tests"
        add(f"{device} tensors, impl='triton'", served, problem or native)

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    add(
        "TRITON_INTERPRET",
        os.environ.get("TRITON_INTERPRET") or "unset",
        "kernels run in Triton's interpreter" if interpreted else "kernels are compiled, for GPU tensors",
    )
    add(
        "FASTELBO_IMPL",
        os.environ.get("FASTELBO_IMPL") or "unset",
        "Triton for GPU tensors, plain PyTorch otherwise" if default == "auto" else "the default of calls without impl=",
    )
    return rows


def chosen(impl: str | None, device: str) -> tuple[str, str]:
    """The backend's name for a call, or "none" and what the call would raise."""
    try:
        module = backend.choose(impl, torch.device(device))
    except Exception as error:  # a broken triton raises what it likes, and finding that out is what this command is for
        return "none", str(error) or type(error).__name__
    return ("reference" if module is None else "torch" if module is backend.EAGER else "triton"), ""


def because(served: str, device: str) -> str:
    if backend.DEFAULT != "auto":
        return "forced by FASTELBO_IMPL"
    if served == "triton":
        return "GPU tensors, and triton is installed"
    return "GPU tensors, but triton is not installed" if device == "cuda" else "not a GPU: plain PyTorch, analytic gradients"


def describe(device: dict[str, Any]) -> str:
    if device["device"] == "cpu":
        return f"{device['name']}, {device['cores']} cores, torch uses {device['threads']} threads"
    driver = f", driver {device['driver']}" if "driver" in device else ""
    return f"{device['name']}, {device['memory_gib']} GiB, capability {device['capability']}{driver}"


def print_plain(facts: dict[str, Any]) -> None:
    def section(title: str, rows: list[tuple[str, ...]]) -> None:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        print(title)
        for *cells, last in rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last, sep="  ")

    section("versions", list(facts["versions"].items()))
    section("devices", [(d["device"], describe(d)) for d in facts["devices"]])
    section("backends", [(b["calls"], b["backend"], b["why"]) for b in facts["backends"]])


def print_rich(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def section(title: str, rows: list[tuple[str, ...]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=box.SIMPLE, pad_edge=False)
        for i in range(len(rows[0])):
            table.add_column(style="cyan" if i == 0 else None, no_wrap=i < len(rows[0]) - 1)
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)

    console = Console(highlight=False)
    section("versions", list(facts["versions"].items()))
    section("devices", [(d["device"], describe(d)) for d in facts["devices"]])
    section("which backend serves what, and why", [(b["calls"], b["backend"], b["why"]) for b in facts["backends"]])
