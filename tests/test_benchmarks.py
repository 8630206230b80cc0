"""The benchmark suite: its workloads are what they say, wrong numbers report no speed, and the report is what the data says."""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastelbo
from benchmarks import __main__ as suite
from benchmarks import measure, plots, records, report
from benchmarks.workloads import WORKLOADS, Draw, Workload
from fastelbo import backend

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers without the minutes that compiling them takes; tests/contracts/test_compile.py has compiled numbers."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)


@each_workload
def test_peers_compute_the_same(workload: Workload, uncompiled: None) -> None:
    inputs = workload.inputs(Draw(CPU, torch.float32), **workload.sizes("tiny"))
    found = measure.errors(workload, measure.peers(workload), inputs)
    assert set(found) == set(measure.PEERS)
    assert max(found.values()) < 2e-6, found


@each_workload
def test_byte_model_counts_the_inputs(workload: Workload) -> None:
    """What is read in forward is what the inputs hold, except for masks, scalars and vectors; a step moves more than that."""
    sizes = workload.sizes("small")
    elements, forward, step = workload.traffic(**sizes)
    inputs = workload.inputs(Draw(CPU, torch.float32), **sizes)
    held = sum(t.numel() for name, t in inputs.items() if name not in ("mask", "grad_z"))
    passes = 2 if workload.name == "rssm" else 1
    assert forward * 0.9 <= held * passes <= forward * 1.2, (forward, held)
    assert step > forward >= elements
    assert workload.sizes("full") == workload.full


def test_wrong_gradients_report_no_speed(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    elbo = backend.EAGER.elbo

    def broken(*args: Any) -> Any:
        outputs, gradients = elbo.forward(*args)
        return outputs, (gradients[0] * 1.001, *gradients[1:])

    monkeypatch.setattr(backend, "EAGER", backend.EAGER._replace(elbo=elbo._replace(forward=broken)))
    record = measure.measure(WORKLOADS[0], CPU, torch.float32, "tiny", True, 10.0)
    assert record["wrong"] == list(measure.OURS)
    assert record["errors"]["fastelbo"] == pytest.approx(1e-3, rel=0.01)
    assert "peers" not in record


def test_nan_is_wrong() -> None:
    assert measure.wrong({"eager": float("nan"), "fastelbo": 0.0}, torch.float32) == ["eager"]


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [([2.0, 4.1], [2.0, 4.0], 0.025), ([0.0], [0.0], 0.0), ([1e-9], [0.0], math.inf), ([1.0, math.nan], [1.0, 2.0], math.nan)],
)
def test_largest_error(got: list[float], want: list[float], error: float) -> None:
    """The worst of several results, whichever of them it is in."""
    right = torch.ones(3)
    for place in (0, 1):
        pairs = [(right, right)]
        pairs.insert(place, (torch.tensor(got), torch.tensor(want)))
        found = measure.largest_error(*map(list, zip(*pairs, strict=True)))
        assert found == pytest.approx(error, rel=1e-6, nan_ok=True)


def test_products_may_be_off_by_more() -> None:
    found = {"fastelbo": 1.5e-2, "eager": 0.05}
    assert measure.wrong(found, torch.bfloat16) == ["fastelbo"]
    assert measure.wrong(found, torch.bfloat16, products=True) == []


def test_a_record_holds_every_figure(uncompiled: None) -> None:
    record = measure.measure(WORKLOADS[0], CPU, torch.float32, "tiny", True, 10.0)
    assert record["wrong"] == []
    assert record["rounds"] >= 7
    assert list(record["peers"]) == list(measure.PEERS)
    for peer, figures in record["peers"].items():
        step = figures["step_us"]
        assert 0 < step["low"] <= step["median"] <= step["high"]
        assert 0 < figures["forward_us"]["median"] < step["median"]
        assert figures["gb_per_s"] == pytest.approx(record["bytes_step"] / step["median"] / 1e3)
        assert figures["share_of_copy"] == pytest.approx(figures["gb_per_s"] / 10)
        assert (figures["host_us"] is None) == peer.startswith("compiled")
        assert figures["peak_bytes"] > 0
    json.dumps(record)


def test_peak_memory_is_exact() -> None:
    """Two temporaries at once beside the gradient, of which one lives on: counted to the byte, except for the loss itself."""
    n = 1 << 18

    def loss(recon: torch.Tensor) -> torch.Tensor:
        return ((recon * 2.0) * recon).sum()

    inputs = {"recon": torch.ones(n, requires_grad=True)}
    peak = measure.peak_memory(measure.Step(inputs), loss, CPU)
    # Forward holds recon * 2 and the product; backward two gradients of recon beside what was saved, and their sum in one of them.
    assert 3 * 4 * n <= peak <= 4 * 4 * n + 4096


@pytest.mark.parametrize("learned", [False, True])
def test_elbo_takes_its_gradients_and_four_mebibytes(learned: bool) -> None:
    workload = next(w for w in WORKLOADS if w.name == ("celeba-64-logvar" if learned else "celeba-64"))
    for sizes in (workload.sizes("small"), {"batch": 16, "elements": 196_608, "latents": 4_096}):
        step = measure.Step(workload.inputs(Draw(CPU, torch.float32), **sizes))
        gradients = sum(t.numel() * t.element_size() for t in step.wanted)
        peak = measure.peak_memory(step, workload.fused, CPU)
        assert gradients <= peak <= gradients + (4 << 20), (sizes, (peak - gradients) / 2**20)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("scale", [0.3, 1e-3])
@pytest.mark.parametrize("learned", ["mu logvar", "mu logvar prior_mu prior_logvar", "prior_mu prior_logvar"])
def test_a_kl_takes_its_gradients_and_four_mebibytes(learned: str, scale: float, reduction: str) -> None:
    """Near the prior too, where float64 is needed, and in one block as well as in several."""
    for sizes in ((8, 192, 570), (8, 300_000)):
        draw = Draw(CPU, torch.float32)
        inputs = {n: draw(*sizes, scale=scale, grad=n in learned.split()) for n in ("mu", "logvar", "prior_mu", "prior_logvar")}
        step = measure.Step(inputs)
        gradients = sum(t.numel() * t.element_size() for t in step.wanted)
        peak = measure.peak_memory(step, lambda **t: fastelbo.gaussian_kl(**t, reduction=reduction).sum(), CPU)
        assert gradients <= peak <= gradients + (4 << 20), (sizes, (peak - gradients) / 2**20)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_peer_follows_every_other_equally_often(n: int) -> None:
    peers = [str(i) for i in range(n)]
    schedule = measure.orders(peers)
    for _ in range(3):
        rows = [next(schedule) for _ in range(2 * n)]
        assert all(sorted(row) == peers for row in rows)
        follows = collections.Counter(pair for row in rows for pair in itertools.pairwise(row))
        assert set(follows) == {(a, b) for a in peers for b in peers if a != b}
        assert set(follows.values()) == {2}


# ---- the command line ------------------------------------------------------------------------------------------------------------


def test_run_writes_lines_and_resumes(tmp_path: Path, uncompiled: None, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "bench.jsonl"
    arguments = ["--quick", "--workload", "mnist", "--workload", "rssm", "--out", str(out)]
    threads = torch.get_num_threads()
    assert suite.main([*arguments, "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    found = records.load(out)
    assert [r["workload"] for r in found] == ["mnist", "rssm"]
    assert {r["about"]["threads"] for r in found} == {1}
    for key in ("device", "driver", "torch", "triton", "fastelbo", "commit", "python", "date"):
        assert key in found[0]["about"]
    picture = out.with_name("bench-float32.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown, noise = capfd.readouterr()
    assert noise == ""
    assert "mnist" in shown
    assert "(us)" in shown
    assert "GB/s" in shown
    assert f"plot: {picture}" in shown
    picture.unlink()
    assert suite.main([*arguments, "--threads", "1", "--resume"]) == 0
    torch.set_num_threads(threads)
    assert len(out.read_text().splitlines()) == 2
    assert picture.exists()


def test_no_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite.cli, "is_installed", lambda name: name != "matplotlib")
    out = tmp_path / "bench.jsonl"
    out.write_text(json.dumps(recorded()) + "\n")
    suite.draw(Console(), out, recorded()["about"], quick=False)
    assert 'pip install "fastelbo[bench]"' in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_resumed_run_measures_again_what_was_wrong(tmp_path: Path) -> None:
    out, key = tmp_path / "bench.jsonl", recorded()["about"]
    out.write_text(
        "".join(json.dumps(recorded(workload=w, wrong=off)) + "\n" for w, off in (("mnist", []), ("vits", ["fastelbo"])))
    )
    assert [suite.case(r) for r in suite.measured(out, key)] == [("mnist", "float32", "full", False)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workload", "minst"], "minst"),
        (["--dtype", "int8"], "int8"),
        (["--device", "tpu"], "tpu"),
        (["--threads", "x"], "threads"),
    ],
)
def test_bad_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        suite.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.triton
def test_host_times_every_call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from benchmarks import host

    chosen = backend.choose(None, CPU)
    monkeypatch.setattr(host, "IN_A_ROW", 1)
    assert host.main(["--rounds", "1"]) == 0
    assert backend.choose(None, CPU) is chosen
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("│").split("│")] for line in lines) if len(cells) == 8}
    assert list(rows) == list(host.cases())
    assert [rows[name][0] for name in ("elbo_loss", "gaussian_kl, mean", "vdvae-cifar")] == ["2 + 1", "1 + 1", "6 + 6"]
    for _, *times, _ in rows.values():
        assert min(map(float, times)) > 1  # on a busy machine even a step and its forward pass may change places


# ---- the report ------------------------------------------------------------------------------------------------------------------


def recorded(device: str = "NVIDIA H100", driver: str | None = "570.1", eager_us: float = 300.0, **changed: Any) -> dict[str, Any]:
    """A record as a GPU would give it; fastelbo takes 100 us."""
    about = {
        "device": device, "driver": driver, "threads": 16, "torch": "2.11.0 (CUDA 12.8)", "triton": "3.6.0", "fastelbo": "0.1.0",
        "commit": "abc", "python": "3.12", "platform": "Linux", "date": "2026-01-02",
    }  # fmt: skip
    about |= changed.pop("about", {})

    def peer(us: float) -> dict[str, Any]:
        spread = {"median": us, "low": us - 1, "high": us + 1}
        return {
            "forward_us": spread, "step_us": spread, "host_us": 50.0, "peak_bytes": 1 << 20, "gb_per_s": 1.0, "share_of_copy": 0.5,
        }  # fmt: skip

    times = {"eager": eager_us, "torch parts": 400.0, "compiled eager": 150.0, "fastelbo": 100.0, "compiled fastelbo": 120.0}
    return {
        "about": about, "quick": False, "workload": "mnist", "source": "", "dtype": "float32", "scale": "full", "sizes": {},
        "elements": 100_352, "bytes_forward": 1, "bytes_step": 1, "flops_step": 0, "copy_gb_per_s": 3000.0,
        "errors": {}, "wrong": [], "rounds": 31,
        "peers": {p: peer(us) for p, us in times.items()},
    } | changed  # fmt: skip


def cells(text: str, start: str) -> list[str]:
    row = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_table_from_a_recorded_gpu() -> None:
    text = report.tables([recorded(), recorded(eager_us=500.0), recorded(workload="vits", wrong=["fastelbo"], peers={})])
    assert "**NVIDIA H100**, driver 570.1: torch 2.11.0 (CUDA 12.8), triton 3.6.0, fastelbo 0.1.0 at abc" in text
    assert "The speed of a plain copy is 3,000 (3,000-3,000) GB/s." in text
    assert cells(text, "MNIST image, fixed variance") == [
        "MNIST image, fixed variance: `mnist`", "100,352", "float32", "100 (100-100)", "4.00 (3.00-5.00)", "4.00 (4.00-4.00)",
        "1.50 (1.50-1.50)", "1.25 (1.25-1.25)", "1.0", "1.0", "1.0",
    ]  # fmt: skip
    wrong = cells(text, "speech, masked KL")
    assert wrong[:4] == ["speech, masked KL: `vits`", "100,352", "float32", "wrong numbers, no speed"]
    # Each head is explained above the table, and each row has a cell for it.
    heads = cells(text, "loss |")
    assert len(wrong) == len(heads) == len(cells(text, "MNIST"))
    above = text.split("| loss |")[0]
    assert all(f"- *{head}*: " in above for head in heads)
    assert report.tables([]) == ""


def test_summary_needs_no_legend() -> None:
    slower = recorded(workload="cogvideox", eager_us=50.0)
    text = report.summary([recorded(), slower, recorded(workload="vits"), recorded(workload="rssm", wrong=["fastelbo"], peers={})])
    assert "NVIDIA H100 (torch 2.11.0, fastelbo at abc, 2026-01-02)" in text
    same = ["1.0 MiB", "1.0 MiB: as much"]
    assert cells(text, "MNIST") == ["MNIST image, fixed variance, float32", "0.30 ms", "0.10 ms: 3.0 times less", *same]
    assert cells(text, "video") == ["video, 49 frames, float32", "0.05 ms", "0.10 ms: 2.0 times as much", *same]
    assert "speech" not in text
    assert "Over all 3 losses of the benchmarks, eager PyTorch takes 0.5 to 3.0 (median 3.0) times as long as\nfastelbo." in text
    assert "The same formula in torch.compile takes 1.5 to 1.5 (median 1.5) times as long as fastelbo without" in text
    assert report.summary([recorded(wrong=["fastelbo"], peers={})]) == ""


@pytest.mark.parametrize(
    ("ratio", "words"), [(3.04, "3.0 times less"), (1.04, "as much"), (0.97, "as much"), (0.8, "1.2 times as much")]
)
def test_less(ratio: float, words: str) -> None:
    assert report.less(ratio) == words


def test_every_workload_and_peer_has_words() -> None:
    assert set(records.LOSSES) == {w.name for w in WORKLOADS}
    assert len(set(records.LOSSES.values())) == len(WORKLOADS)
    assert set(report.SHOWN) < set(records.LOSSES)
    assert set(records.WORDS) == set(measure.PEERS)
    assert {*plots.STYLES, "eager"} == set(measure.PEERS)


def test_newest_run_of_each_device_stands() -> None:
    old = recorded(about={"date": "2025-12-31", "commit": "old"}, eager_us=900.0)
    quick = recorded(quick=True, eager_us=800.0)
    other = recorded("EPYC", driver=None)
    found = records.by_device([old, quick, recorded(), other])
    assert {name: [r["peers"]["eager"]["step_us"]["median"] for r in rs] for (name, _), rs in found.items()} == {
        "NVIDIA H100": [300.0], "EPYC, 16 threads": [300.0],
    }  # fmt: skip
    assert {slug for _, slug in found} == {"nvidia-h100", "epyc-16-threads"}


def test_pictures_are_of_one_dtype_and_of_right_numbers() -> None:
    wrong = recorded(workload="vits", wrong=["fastelbo"], peers={})
    half = recorded(dtype="bfloat16")
    found = plots.pictures([half, recorded(), wrong], Path("a.b/c.d"))
    assert found == {Path("a.b/c.d-float32.png"): [recorded()], Path("a.b/c.d-bfloat16.png"): [half]}


@pytest.mark.parametrize("which", ["every", "one", "products"])
def test_nothing_of_a_picture_is_cut(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figures: list[Any] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: (figures.append(self), saved(self, *args, **options)))
    chosen = {"every": WORKLOADS, "one": WORKLOADS[:1], "products": [w for w in WORKLOADS if w.flops]}[which]
    found = [
        recorded(workload=w.name, eager_us=30.0 * 1.5**i, bytes_step=10**6 * 2**i, flops_step=int(w.flops is not None))
        for i, w in enumerate(chosen)
    ]
    plots.draw("AMD Ryzen Threadripper PRO 5995WX 64-Cores, 128 threads", found, tmp_path / "x.png")
    (figure,) = figures
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert width * figure.dpi == 1000
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    texts = [t.get_text() for t in figure.findobj(Text)]
    assert any("speed of a plain copy, 3,000 GB/s" in t for t in texts) == (which != "products")
    assert all(t.get_fontsize() >= 9 for t in figure.findobj(Text))


def test_report_writes_checks_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme, docs = tmp_path / "results", tmp_path / "README.md", tmp_path / "docs"
    arguments = ["report", "--results", str(results), "--readme", str(readme), "--docs", str(docs)]
    results.mkdir()
    docs.mkdir()
    for page in (readme, docs / "benchmarks.md"):
        page.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    assert suite.main(arguments) == 2  # no data
    (results / "h100.jsonl").write_text(json.dumps(recorded()) + "\n" + json.dumps(recorded(dtype="bfloat16")) + "\n")
    assert suite.main([*arguments, "--check"]) == 1
    assert "stale" in readme.read_text()
    assert suite.main(arguments) == 0
    assert suite.main([*arguments, "--check"]) == 0
    names = [f"bench-nvidia-h100-{dtype}.png" for dtype in ("float32", "bfloat16")]
    for page, figure in ((readme, "3.0 times less"), (docs / "benchmarks.md", "3.00")):
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert figure in text
        assert all(f"]({name})" in text for name in names) == (page != readme)
        page.write_text(text.replace(figure, "4.00"))
        assert suite.main([*arguments, "--check"]) == 1
        page.write_text(text)
    for name in names:
        assert (docs / name).read_bytes().startswith(b"\x89PNG")
    (docs / name).unlink()
    assert suite.main([*arguments, "--check"]) == 1
    assert f"{name} is missing" in capsys.readouterr().err
    readme.write_text("no marks")
    assert suite.main(arguments) == 2
    assert "once each" in capsys.readouterr().err


def test_numerics_has_a_row_for_each_function() -> None:
    def row(op: str, result: str, fused: Any, eager: Any, lost: int = 0) -> dict[str, Any]:
        of = {"fused": {"max_ulp": fused, "lost": 0}, "eager": {"max_ulp": eager, "lost": lost}}
        return {"op": op, "result": result, **of}

    text = report.numerics([
        row("kl/standard", "kl", 0.97, 4.8e6), row("kl/standard", "d mu", 0.5, 0.5), row("kl/std", "kl", 1.84, "nan", 7),
        row("kl/std", "d std", 1.2, 2.0, 2), row("draw", "z", 1.0, 1.0),
    ])  # fmt: skip
    assert cells(text, "`kl`") == ["`kl`", "1.8 (kl)", "4.8e6 (kl)", "1.2 (std)", "2 (std)", "", "9"]
    assert cells(text, "`draw`") == ["`draw`", "1 (z)", "1 (z)", "", "", "", ""]


def test_no_figure_beside_the_table() -> None:
    """A speed-up in the README that no file vouches for: figures with a unit of time stand between the marks only."""
    text = (ROOT / "README.md").read_text()
    head, rest = text.split(report.BEGIN)
    prose = head + rest.split(report.END)[1]
    assert not re.findall(r"\b\d[\d.,]* ?(?:us|µs|ms)\b", prose)
