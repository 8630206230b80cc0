"""`make gpu-check`, rehearsed on a CPU: every part runs, what fails or hangs is told, and summary.md is what the parts found."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import gpu_check, kernels, machine, measure, summary
from benchmarks.gpu_check import Group, Part
from fastelbo import backend

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a rehearsal needs Triton's interpreter")


def script(code: str, name: str = "script", **environment: str) -> Part:
    return Part(name, {name: [sys.executable, "-c", code]}, environment)


def cells(text: str, *start: str) -> list[str]:
    """The row of a table that starts so."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {' | '.join(start)} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


# ---- the rehearsal ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """(exit status, folder). What starts slowly runs in this process, with the arguments that its own process would get."""
    folder = tmp_path_factory.mktemp("gpu-check")
    groups = gpu_check.plan(folder, rehearsal=True)
    environment, kernel, untimed, *suites = groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **_: f)
        for (part,) in (g.parts for g in suites):
            (command,) = part.commands.values()
            assert suite.main(command[3:]) == 0
        patch.setattr(backend, "DEFAULT", kernel.parts[0].environment["FASTELBO_IMPL"])
        assert kernels.main(kernel.parts[0].commands["kernels"][3:]) == 0
    broken = Group(1.0, [script("print('no such kernel'); raise SystemExit(3)", "broken")])
    return gpu_check.check(folder, [environment, Group(60.0, untimed.parts), broken], rehearsal=True), folder


def test_one_broken_part_makes_the_exit_status_1(rehearsed: tuple[int, Path]) -> None:
    status, folder = rehearsed
    text = (folder / "summary.md").read_text()
    assert status == 1
    assert cells(text, "broken")[1] == "failed"
    assert (folder / "broken.txt").read_text() == "no such kernel\n"
    for part in ("environment", "tests", "compare"):
        assert cells(text, part)[1] == "passed"
        assert float(cells(text, part)[2]) > 0


def test_summary_tells_what_every_part_found(rehearsed: tuple[int, Path]) -> None:
    text = (rehearsed[1] / "summary.md").read_text()
    assert "A rehearsal on a CPU" in text
    for case in kernels.CASES:
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            (row,) = (line for line in text.splitlines() if line.startswith(f"| {case.name} | 120 | {dtype} |"))
            assert "wrong" not in row
            moved = {"elbo_loss": 3 + 4 * 2 / 40, "gaussian_nll": 5, "gaussian_kl": 6, "reparameterize_kl": 8}.get(case.name)
            if moved is not None:
                assert cells(row, case.name)[3] == f"{size * moved:.1f}"
    assert text.count("| MISSED |") == len(summary.TARGETS)
    assert re.search(r"^2 passed, 34 skipped$", text, re.MULTILINE)
    assert re.search(r"^- float32: \d+ results, all within the bound$", text, re.MULTILINE)
    assert cells(text, "MNIST image, fixed variance: `mnist`", "100,352", "bfloat16")[3].replace(",", "").isdigit()
    assert cells(text, "torch")[1].startswith(torch.__version__)


def test_records_hold_copy_graph_and_memory(rehearsed: tuple[int, Path]) -> None:
    records = summary.read_lines(rehearsed[1] / "kernels.jsonl")
    assert len(records) == 2 * len(kernels.CASES)
    for r in records:
        assert r["wrong"] == []
        assert r["errors"][kernels.GRAPH] == 0.0
        assert r["graph"]["capture_us"] > 0
        assert list(r["peers"]) == list(kernels.PEERS)
        assert r["copy_gb_per_s"] == pytest.approx(2 * machine.Cpu.copy_bytes / r["copy_us"]["median"] / 1e3)
        for figures in (r["graph"], *r["peers"].values()):
            speed = r["bytes_step"] / figures["step_us"]["median"] / 1e3
            assert figures["share_of_copy"] == pytest.approx(speed / r["copy_gb_per_s"])
        assert r["peers"]["fastelbo"]["peak_bytes"] > 0


def test_second_call_does_what_has_not_passed(rehearsed: tuple[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = rehearsed[1]
    again = [Group(1.0, [script("raise SystemExit(4)", "environment")]), Group(1.0, [script("", "broken")])]
    assert gpu_check.check(folder, again, rehearsal=True) == 0
    told = capsys.readouterr().out
    assert "broken: passed" in told
    assert "environment: " not in told
    # What a rehearsal left does not count for a GPU.
    assert gpu_check.check(folder, again, rehearsal=False) == 1


def test_plan_for_a_gpu_covers_everything_in_nine_minutes(tmp_path: Path) -> None:
    groups = gpu_check.plan(tmp_path, rehearsal=False)
    assert sum(g.seconds for g in groups) <= gpu_check.LIMIT <= 540 - 2 * gpu_check.GRACE
    parts = {p.name: p for g in groups for p in g.parts}
    assert list(parts) == ["environment", "kernels", "tests", "compare", "suite, float32", "suite, bfloat16"]
    shards = [c[c.index("--shard") + 1] for c in parts["tests"].commands.values()]
    assert shards == [f"{i}/{gpu_check.SHARDS}" for i in range(gpu_check.SHARDS)]
    assert {c[c.index("--dtype") + 1] for c in parts["compare"].commands.values()} == {"float32", "bfloat16", "float16", "float64"}
    assert not any("--cpu-rehearsal" in c or "--workload" in c or "-k" in c for p in parts.values() for c in p.commands.values())


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- parts that hang -------------------------------------------------------------------------------------------------------------


def test_part_out_of_time_is_interrupted_and_the_next_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hangs = Part("hangs", {"hangs": ["bash", "-c", "trap 'echo interrupted; exit 2' INT; sleep 60 & wait"]}, {})
    start = time.monotonic()
    assert gpu_check.check(tmp_path, [Group(1.0, [hangs]), Group(1.0, [script("print('ran')")])], True, limit=8.0) == 1
    assert time.monotonic() - start < 20
    text = (tmp_path / "summary.md").read_text()
    assert cells(text, "hangs")[1] == "stopped, out of time"
    assert cells(text, "script")[1] == "passed"
    assert (tmp_path / "hangs.txt").read_text() == "interrupted\n"


def test_part_that_ignores_interrupts_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    deaf = script("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)")
    found = gpu_check.run(tmp_path, [deaf], [], 2.0)
    assert found["script"]["status"] == "stopped, out of time"
    assert found["script"]["seconds"] < 10


def test_what_runs_beside_ends_with_the_parts(tmp_path: Path) -> None:
    beside = script("import time; time.sleep(60)", "beside")
    start = time.monotonic()
    found = gpu_check.run(tmp_path, [script("")], [beside], 30.0)
    assert list(found) == ["script"]
    assert time.monotonic() - start < 15


# ---- numbers that are off, and what is told --------------------------------------------------------------------------------------


class Stale(machine.Cpu):
    """A graph that does not write what it should."""

    def capture(self, action: Any) -> Any:
        return action(), lambda: None


def test_graph_with_other_numbers_reports_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    case = next(c for c in kernels.CASES if c.name == "gaussian_kl")
    record = kernels.measure(case, Stale(), torch.float32, case.sizes("tiny"), 2, 0.0)
    assert record["wrong"] == [kernels.GRAPH]
    assert "peers" not in record
    assert "wrong numbers, no speed: CUDA graph nan" in summary.kernel_table([record])


class Unable(machine.Cpu):
    def capture(self, action: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_what_cannot_be_captured_is_timed_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(machine, "Cpu", Unable)
    monkeypatch.setattr(kernels, "CASES", [c for c in kernels.CASES if c.name == "gaussian_kl"])
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32,))
    assert kernels.main(["--out", str(tmp_path / "k.jsonl"), "--cpu-rehearsal"]) == 1
    (record,) = summary.read_lines(tmp_path / "k.jsonl")
    assert record["peers"]["fastelbo"]["step_us"]["median"] > 0
    assert "of a copy; no graph, operation not permitted when stream is capturing" in capsys.readouterr().out
    assert cells(summary.kernel_table([record]), "gaussian_kl")[12] == "operation not permitted when stream is capturing"


def test_case_that_raises_is_told_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(kernels, "CASES", [c for c in kernels.CASES if c.name.startswith("gaussian")])
    monkeypatch.setattr(kernels.fastelbo, "gaussian_nll", lambda *_, **__: torch.ones(3).view(2))
    assert kernels.main(["--out", str(tmp_path / "k.jsonl"), "--cpu-rehearsal"]) == 1
    nll, _, kl, _ = summary.read_lines(tmp_path / "k.jsonl")
    assert "RuntimeError" in nll["failed"]
    assert kl["peers"]["fastelbo"]["step_us"]["median"] > 0
    assert "gaussian_nll, float32: failed, RuntimeError" in capsys.readouterr().out
    assert "RuntimeError" in cells(summary.kernel_table([nll]), "gaussian_nll")[3]


def as_measured(kernel: str, dtype: str, us: dict[str, float], mib: dict[str, float], share: float) -> dict[str, Any]:
    peers = {p: {"step_us": {"median": us[p]}, "peak_bytes": mib[p] * 2**20, "share_of_copy": share} for p in us}
    return {"workload": kernel, "dtype": dtype, "peers": peers}


def test_targets_are_met_or_missed() -> None:
    us = {"fastelbo": 100.0, "compiled eager": 149.0, "eager": 600.0}
    linear = {"fastelbo": 100.0, "compiled eager": 400.0, "eager": 900.0}
    mib = {"fastelbo": 10.0, "compiled eager": 99.0, "eager": 200.0}
    rows = summary.targets([
        as_measured("elbo_loss", "float32", us, mib, 0.9), as_measured("linear_elbo_loss", "bfloat16", linear, mib, 0.1),
        {"workload": "reparameterize_kl", "dtype": "float32", "wrong": ["fastelbo"]},
    ])  # fmt: skip
    verdicts = {tuple(row[:3]): (row[4], row[5]) for row in rows}
    assert verdicts["elbo_loss", "float32", summary.COPY] == ("90%", "met")
    assert verdicts["elbo_loss", "float32", summary.COMPILED] == ("1.49", "MISSED")
    assert verdicts["elbo_loss", "float32", summary.EAGER] == ("6.00", "met")
    assert verdicts["linear_elbo_loss", "bfloat16", summary.COMPILED] == ("4.00", "met")
    assert verdicts["linear_elbo_loss", "bfloat16", summary.MEMORY] == ("9.9", "MISSED")
    assert verdicts["reparameterize_kl", "float32", summary.COPY] == ("", "not measured")
    assert len(rows) == 4 * 3 + 2 + 2 * 2


def test_failed_and_unfinished_tests_are_named() -> None:
    log = (
        "collected 5 items\n"
        "tests/test_a.py::test_one PASSED                           [ 20%]\n"
        "tests/test_a.py::test_two[float32-a b] FAILED              [ 40%]\n"
        "tests/test_a.py::test_three SKIPPED (needs two GPUs)       [ 60%]\n"
        "tests/contracts/test_b.py::test_four ERROR                 [ 80%]\n"
        "ERROR tests/test_c.py - ModuleNotFoundError: No module named 'mpmath'\n"
        "ERROR tests/contracts/test_b.py::test_four - RuntimeError\n"
        "tests/contracts/test_b.py::test_five "
    )
    assert summary.tests(log) == (
        "1 passed, 1 failed, 1 skipped, 1 error, 1 not finished, 1 not imported\n\n"
        "- tests/test_a.py::test_two[float32-a b]: failed\n"
        "- tests/contracts/test_b.py::test_four: error\n"
        "- tests/contracts/test_b.py::test_five: not finished\n"
        "- tests/test_c.py: not imported\n"
    )


def test_verdict_of_compare() -> None:
    assert summary.verdict("a table\n222 results, seed 0. Bound\nAll are within it.\n") == "222 results, all within the bound"
    bad = summary.verdict("a table\n222 results, seed 0. Bound\n1 are NOT within it. The worst of each kind:\ngaussian_kl, d mu\n")
    assert bad.endswith("\n    1 are NOT within it. The worst of each kind:\n    gaussian_kl, d mu")
    assert summary.verdict("starting\nCUDA error: out of memory\n") == "no verdict; its last words: CUDA error: out of memory"


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "k.jsonl").write_text(json.dumps({"a": 1}) + '\n{"a": ')
    assert summary.read_lines(tmp_path / "k.jsonl") == [{"a": 1}]


# ---- what a GPU is asked ---------------------------------------------------------------------------------------------------------


def test_clocks_as_nvidia_smi_prints_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'P0, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 312.50 W, 700.00 W, 41'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    clocks = machine.Gpu().clocks()
    assert list(clocks) == list(machine.CLOCKS)
    assert (clocks["clocks.sm"], clocks["power.limit"], clocks["temperature.gpu"]) == ("1980 MHz", "700.00 W", "41")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert "no answer of nvidia-smi" in machine.Gpu().clocks()["pstate"]


def test_inputs_are_rotated_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in kernels.CASES if c.name == "gaussian_kl")
    cpu = machine.Cpu()
    inputs = case.inputs(measure.Draw(cpu.device, torch.float32), **case.sizes("tiny"))
    held = 2 * 120 * 4
    monkeypatch.setattr(cpu, "l2_bytes", held)
    draws = measure.rotated(case, cpu, inputs, case.sizes("tiny"))
    assert len(draws) == 3
    assert draws[0] is inputs
    assert not torch.equal(draws[1]["mu"], draws[2]["mu"])
