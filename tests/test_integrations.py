"""What the adapters of `fastelbo.integrations` share, and the one that needs torch alone. The others: tests/integrations."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, LogNormal, Normal, kl, kl_divergence, register_kl

from fastelbo.integrations import diffusers, distributions, patching, pyro, pythae

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES: dict[str, ModuleType] = {"diffusers": diffusers, "pythae": pythae, "pyro-ppl": pyro}


# ---- patching --------------------------------------------------------------------------------------------------------------------


class Base:
    inherited = "inherited"


class Library(Base):
    own = "own"

    @staticmethod
    def static() -> str:
        return "static"


def library_patch() -> patching.Patch:
    return patching.Patch(
        lambda: patching.replaced([(Library, "own", "new"), (Library, "inherited", "new"), (Library, "static", lambda: "new")])
    )


def values() -> list[str]:
    return [Library.own, Library.inherited, Library.static()]


OLD, NEW = ["own", "inherited", "static"], ["new"] * 3


def test_a_call_patches_until_it_is_undone() -> None:
    patch, before = library_patch(), dict(vars(Library))
    for _ in range(2):
        patch.apply()
        patch.apply()
        assert values() == NEW
        patch.undo()
        assert values() == OLD
        patch.undo()
        assert dict(vars(Library)) == before
    assert vars(Base)["inherited"] == "inherited"


def test_a_block_leaves_what_it_found() -> None:
    patch, before = library_patch(), dict(vars(Library))
    with patch.apply():
        assert values() == NEW
        with patch.apply():
            assert values() == NEW
        assert values() == NEW
    assert dict(vars(Library)) == before
    patch.apply()
    with pytest.raises(RuntimeError, match="within"), patch.apply():
        raise RuntimeError("within")
    assert values() == NEW
    patch.undo()
    with patch.apply():
        patch.undo()
        assert values() == OLD
    assert dict(vars(Library)) == before


def test_an_error_within_a_block_restores() -> None:
    with pytest.raises(RuntimeError, match="within"), library_patch().apply():
        raise RuntimeError("within")
    assert values() == OLD


def test_a_change_that_fails_leaves_nothing_behind() -> None:
    fails = patching.Patch(lambda: patching.replaced([(Library, "own", "new"), (object(), "own", "new")]))
    for _ in range(2):
        with pytest.raises(TypeError):
            fails.apply()
        assert values() == OLD
    fails.undo()


def test_threads_patch_once() -> None:
    made: list[int] = []

    @contextmanager
    def change() -> Iterator[None]:
        made.append(1)
        yield

    patch = patching.Patch(change)
    threads = [threading.Thread(target=patch.apply) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


# ---- libraries -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_unknown_version_is_refused(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = LIBRARIES[library].KNOWN
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {library: "0.0.7"}[name])
    with pytest.raises(ImportError, match=rf"^fastelbo patches {library} {known}, but {library} 0\.0\.7 is installed$"):
        LIBRARIES[library].patch()
    LIBRARIES[library].unpatch()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"^fastelbo patches {library} .*, but no {library} is installed$"):
        LIBRARIES[library].patch()


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_version_that_is_known_is_the_one_that_is_tested(library: str) -> None:
    # The files themselves: what is installed as metadata may be older.
    pin = f"{library}=={LIBRARIES[library].KNOWN}"
    assert f'"{pin}"' in (ROOT / "pyproject.toml").read_text()
    assert pin in (ROOT / "constraints-integrations.txt").read_text().splitlines()


def test_nothing_is_imported_before_it_is_patched() -> None:
    code = """
import sys
from fastelbo.integrations import diffusers, distributions, pyro, pythae
import fastelbo
sys.exit(any(name in sys.modules for name in ("diffusers", "pyro", "pythae")))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "integrations" not in importlib.import_module("fastelbo").__all__


# ---- torch.distributions ---------------------------------------------------------------------------------------------------------


def expected(q: SimpleNamespace, p: SimpleNamespace) -> Tensor:
    """log(s2 / s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2."""
    return torch.log(p.scale / q.scale) + (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2) - 0.5


@pytest.mark.parametrize("shapes", [((4, 3), (4, 3)), ((4, 1), (3,)), ((3,), (4, 3)), ((), ()), ((2, 1, 3), (4, 1))])
def test_kl_of_two_normals(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes for _ in range(2)]

    def results(divergence: Callable[[Normal, Normal], Tensor]) -> list[Tensor]:
        q, p = Normal(leaves[0], leaves[1].exp()), Normal(leaves[2], leaves[3].exp())
        value = divergence(q, p)
        return [value, *torch.autograd.grad(value.sin().sum(), leaves)]

    want, before = results(expected), results(kl_divergence)
    with distributions.patch():
        got = results(kl_divergence)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, results(kl_divergence), before))


def test_torchs_own_rules_go_through_it() -> None:
    q, p = Normal(torch.randn(5, 4, 3), torch.rand(5, 4, 3) + 0.1), Normal(torch.randn(4, 3), 2.0)
    want = expected(q, p)
    with distributions.patch():
        torch.testing.assert_close(kl_divergence(Independent(q, 2), Independent(p.expand((5, 4, 3)), 2)), want.sum((1, 2)))
        logs = kl_divergence(LogNormal(q.loc, q.scale), LogNormal(p.loc, p.scale))
        torch.testing.assert_close(logs, want)


def test_near_the_prior_it_does_not_cancel() -> None:
    q, p = Normal(torch.zeros(1), torch.tensor([1.0 + 2**-14])), Normal(torch.zeros(1), 1.0)
    # With s = 1 + h, log(1 / s) + (s^2 - 1) / 2 is h^2 - h^3 / 3 + ...
    h = 2.0**-14
    with distributions.patch():
        torch.testing.assert_close(kl_divergence(q, p), torch.tensor([h * h - h**3 / 3]), rtol=1e-6, atol=0.0)


def test_the_registrations_are_restored() -> None:
    class Mine(Normal):
        pass

    kl_divergence(Mine(0.0, 1.0), Normal(0.0, 1.0))  # torch remembers which function serves the two types
    before = list(kl._KL_REGISTRY.items())
    for _ in range(2):
        distributions.patch()
        assert list(kl._KL_REGISTRY.items()) != before
        assert kl._dispatch_kl(Mine, Normal) is kl._KL_REGISTRY[Normal, Normal]
    distributions.unpatch()
    assert list(kl._KL_REGISTRY.items()) == before
    assert kl._dispatch_kl(Mine, Normal) is kl._KL_REGISTRY[Normal, Normal]


def test_a_registration_of_a_subclass_is_kept() -> None:
    class Special(Normal):
        pass

    try:
        register_kl(Special, Special)(lambda p, q: torch.tensor(7.0))
        with distributions.patch():
            assert kl_divergence(Special(0.0, 1.0), Special(1.0, 1.0)).item() == 7
    finally:
        del kl._KL_REGISTRY[Special, Special]
        kl._KL_MEMOIZE.clear()


def test_a_torch_without_the_registration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "_KL_REGISTRY", {})
    with pytest.raises(ImportError, match="fastelbo knows no torch"):
        distributions.patch()


def test_example() -> None:
    assert doctest.testmod(distributions) == doctest.TestResults(0, 5)
