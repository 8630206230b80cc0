"""What a result depends on, and so is keyed by. `python -m benchmarks.environment --out FILE` writes it, and prints more."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fastelbo
from fastelbo import cli

from . import machine as machines


def about(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and day, as JSON can hold them."""
    versions = cli.versions()
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else cli.cpu_name()
    return {
        "device": name,
        "driver": cli.nvidia_driver() if on_gpu and not torch.version.hip else None,
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "triton": versions["triton"],
        "fastelbo": fastelbo.__version__,
        "commit": commit(),
        "python": versions["python"],
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        at = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "fastelbo", "kernels", "benchmarks/*.py"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return at.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.environment", description="What a result here depends on.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = machines.of(device)
    options.out.write_text(json.dumps(about(device) | machine.clocks(), indent=2))
    cli.main(["info"])
    print(machine.status())
    return 0


if __name__ == "__main__":
    sys.exit(main())
