"""The commands: what they print, their exit status, and what they say without the extras."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastelbo
from fastelbo import backend, cli


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    installed = cli.is_installed
    monkeypatch.setattr(cli, "is_installed", lambda name: name not in modules and installed(name))


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    return {row["calls"]: (row["backend"], row["why"]) for row in facts["backends"]}


@pytest.fixture
def no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nobody set FASTELBO_IMPL."""
    monkeypatch.delenv("FASTELBO_IMPL", raising=False)
    monkeypatch.setattr(backend, "DEFAULT", "auto")


def test_module_and_script_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "fastelbo", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, f"fastelbo {fastelbo.__version__}")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["demo", "--device", "tpu"]])
def test_bad_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "usage: fastelbo" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [["rich"], ["matplotlib"], ["sklearn"], ["rich", "matplotlib", "sklearn"]])
def test_demo_names_what_is_missing(
    missing: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, *missing)
    assert cli.main(["demo"]) == 2
    out, err = capsys.readouterr()
    names = ", ".join(cli.DEMO_NEEDS[module] for module in missing)
    assert (out, err) == ("", f'fastelbo: the demo needs {names}: pip install "fastelbo[demo]"\n')


def test_extras_are_really_optional(tmp_path: Path) -> None:
    code = """if True:
        import sys
        for name in ("rich", "matplotlib", "sklearn"):
            sys.modules[name] = None  # importing it, or asking for its spec, then fails
        from fastelbo import cli
        assert cli.main(["info"]) == 0
        sys.exit(cli.main(["demo"]))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == 'fastelbo: the demo needs rich, matplotlib, scikit-learn: pip install "fastelbo[demo]"\n'
    assert torch.__version__ in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plain", [False, True])
def test_info_is_readable(plain: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if plain:
        hide(monkeypatch, "rich")
    else:
        pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    facts = cli.collect()
    for name, version in facts["versions"].items():
        assert name in out
        assert version in out
    assert facts["versions"]["fastelbo"] == fastelbo.__version__
    for row in facts["backends"]:
        assert row["calls"] in out
        assert row["why"] in out
    for device in facts["devices"]:
        assert cli.describe(device) in out


@pytest.mark.usefixtures("no_default")
def test_info_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = rows(capsys)
    assert {calls: served for calls, (served, _) in found.items() if calls.startswith("cpu") and "triton" not in calls} == {
        "cpu tensors": "torch",
        "cpu tensors, float64": "torch",
        "cpu tensors, torch.compile": "torch",
    }
    assert not [calls for calls in found if calls.startswith("cuda")]


@pytest.mark.parametrize(
    ("default", "served", "traced"),
    [("reference", "reference", "reference"), ("nonsense", "none", "none")],
)
def test_info_follows_the_environment(default: str, served: str, traced: str, tmp_path: Path) -> None:
    env = {**os.environ, "FASTELBO_IMPL": default}
    done = subprocess.run(
        [sys.executable, "-m", "fastelbo", "info", "--json"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = {row["calls"]: row for row in json.loads(done.stdout)["backends"]}
    assert found["cpu tensors"]["backend"] == served
    assert found["cpu tensors, torch.compile"]["backend"] == traced
    assert found["FASTELBO_IMPL"]["backend"] == default
    assert "FASTELBO_IMPL" in found["cpu tensors"]["why"]


def test_info_says_what_a_trace_does(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """The one row that is not asked of `backend.choose`."""
    module = {"torch": backend.EAGER, "reference": None}[rows(capsys)[f"{device.type} tensors, torch.compile"][0]]

    def traced(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if backend.choose(None, x.device) is module else 0)

    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    assert compiled(torch.zeros((), device=device)).item() == 1


@pytest.mark.usefixtures("no_default")
def test_info_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of a machine with a GPU, with and without triton, told by a machine that may have neither."""

    class Properties:
        name, total_memory, major, minor = "Some GPU", 80 * 2**30, 9, 0

    kernels = backend.EAGER._replace(name="fastelbo.kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cli, "nvidia_driver", lambda: "570.1")
    monkeypatch.setattr(backend, "choose", lambda impl, device: backend.EAGER if (impl, device.type) == (None, "cpu") else kernels)
    found = rows(capsys)
    assert found["cuda tensors"] == ("triton", "GPU tensors, and triton is installed")
    assert found["cuda tensors, float64"][0] == "triton"
    assert found["cuda tensors, torch.compile"][0] == "torch"
    assert found["cpu tensors"][0] == "torch"
    assert cli.describe(cli.devices()[1]) == "Some GPU, 80.0 GiB, capability 9.0, driver 570.1"

    monkeypatch.setattr(backend, "choose", lambda impl, device: backend.EAGER)
    assert rows(capsys)["cuda tensors"] == ("torch", "GPU tensors, but triton is not installed")


def test_info_survives_a_broken_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(impl: str | None, device: torch.device) -> None:
        raise OSError("libtriton.so: wrong architecture")

    monkeypatch.setattr(backend, "choose", broken)
    assert rows(capsys)["cpu tensors"] == ("none", "libtriton.so: wrong architecture")
