"""Two processes on a CPU: the gradients of DDP and of FSDP2, and inputs whose batch is sharded, equal those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import CALLS

PROGRAM = Path(__file__).resolve().parent.parent / "two_processes.py"


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, str(PROGRAM)]
    args = str(folder / "meeting"), str(folder / "found.json")
    started = [
        subprocess.Popen([*command, str(rank), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(told)
    found: dict[str, float] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", [f"DTensor {name}" for name in CALLS])
def test_inputs_whose_batch_is_sharded(differences: dict[str, float], name: str) -> None:
    """Values and gradients of float64 inputs, which come back as DTensors. Noise from a seed is that of the whole batch."""
    assert differences[name] < 1e-6  # noise is float32's, and rounds otherwise in operations that are distributed


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_a_model_in_two_processes(differences: dict[str, float], name: str) -> None:
    assert differences[name] < 2e-6
