"""What every test relies on: where kernels run, how many threads, which seeds."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import quick_interpreter

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU and "TRITON_INTERPRET" not in os.environ:
    # Triton reads this when it decorates a kernel, its own library functions included, so it must come before the first
    # import of triton anywhere. Inductor lives with it: on a CPU it generates C++ and launches no Triton kernel.
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before tests/conftest.py could switch its interpreter on")
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker would otherwise start as many threads as there are cores, and as many compile processes again.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

try:
    import hypothesis
except ImportError:  # a GPU machine with its own Python may lack it; the tests that need it skip themselves
    pass
else:

    class _TorchRandom:
        """Lets hypothesis rewind torch's generator, so that an example draws the same numbers when it is replayed."""

        def seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def getstate(self) -> Any:
            return torch.get_rng_state()

        def setstate(self, state: Any) -> None:
            torch.set_rng_state(state)

    _torch_random = _TorchRandom()  # hypothesis keeps only a weak reference
    hypothesis.register_random(_torch_random)

    # No deadline: a first example pays for compilation or for the interpreter's start.
    _common: dict[str, Any] = {
        "deadline": None,
        "print_blob": True,
        "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    }
    hypothesis.settings.register_profile("dev", max_examples=25, **_common)
    hypothesis.settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **_common)
    hypothesis.settings.register_profile("thorough", max_examples=500, **_common)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="K/N", default="0/1", help="the Kth of N equal shares of what is selected")


def pytest_report_header() -> list[str]:
    where = torch.cuda.get_device_name(0) if HAS_GPU else "CPU"
    kernels = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "native"
    return [f"torch {torch.__version__} on {where}, {torch.get_num_threads()} threads; Triton kernels: {kernels}"]


@pytest.hookimpl(trylast=True)  # after -k and -m, so that shards share what these select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    # In blocks: neighbours run the same kernels, which a process compiles once.
    own = [item for i, item in enumerate(items) if i // 16 % shards == shard]
    if len(own) < len(items):
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i // 16 % shards != shard])
        items[:] = own
    if HAS_GPU:
        return
    no_gpu = pytest.mark.skip(reason="no GPU that PyTorch can use")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(scope="session", autouse=True)
def _collect_less_garbage() -> Iterator[None]:
    """What has been imported and collected stays to the end: garbage collections need not look through it again.

    Triton's interpreter makes many small objects, so at Python's own threshold collections would run all the time.
    """
    gc.freeze()
    threshold = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests put their tensors: the GPU if there is one."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def native_env() -> dict[str, str]:
    """The environment for a subprocess in which Triton compiles instead of interpreting."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    torch.manual_seed(20140414)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    """One test's compiled graphs must not count against another's recompilation limit."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
