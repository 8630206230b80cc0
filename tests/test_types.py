"""Types of the public names, as mypy and pyright see them in a user's code, both strict."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fastelbo

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tests" / "typed.py"
CHECKERS = {
    # Of the package only the interface counts here; `make lint` checks its inside. torch has functions without types.
    "mypy": ["-m", "mypy", "--config-file=", "--strict", "--follow-imports=silent", "--untyped-calls-exclude=torch"],
    "pyright": ["-m", "pyright", "--pythonpath", sys.executable],
}

WRONG = """# pyright: strict
import torch

import fastelbo

t = torch.zeros(2, 3)
fastelbo.gaussian_kl(t, t, reduction="average")
fastelbo.elbo_loss(t, t, t, t, impl="cuda")
fastelbo.elbo_loss(t, t, t, t, return_terms=True).backward()
fastelbo.elbo_loss(t, t, t, t, weights=t)
fastelbo.reparameterize(t, t, seed="7")
"""


# One call for both files: a checker that starts anew spends nearly all of its time on torch.
@pytest.mark.parametrize("checker", list(CHECKERS))
def test_the_sample_passes_and_each_wrong_line_is_found(checker: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    command = [sys.executable, *CHECKERS[checker], str(SAMPLE), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert SAMPLE.name not in done.stdout, done.stdout
    for line in range(7, 12):
        assert f"wrong.py:{line}:" in done.stdout, f"line {line} passed:\n{done.stdout}"


def test_the_sample_runs_and_uses_every_public_name(native_env: dict[str, str]) -> None:
    source = SAMPLE.read_text()
    assert [name for name in fastelbo.__all__ if f"fastelbo.{name}" not in source] == []
    done = subprocess.run([sys.executable, str(SAMPLE)], cwd=ROOT, env=native_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "True", "0", "0", "NumericsMismatch", "True"]
