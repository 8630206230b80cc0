"""Which module may import which, read from the source: imports inside functions count like any other."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# An arrow from each part to those that it may import. A part is a module of fastelbo, or a folder of them.
BOTTOM = {"dtypes", "tracing", "noise", "specs", "types"}
ARGUMENTS = BOTTOM | {"checks", "arguments"}
PUBLIC = ARGUMENTS | {"autograd", "backend"}
ALLOWED = {
    "dtypes": set(),
    "types": set(),
    "tracing": set(),
    "specs": {"dtypes"},
    "noise": {"dtypes", "tracing", "types"},
    "checks": BOTTOM,
    "arguments": BOTTOM | {"checks"},
    # What is computed, three times. None of them knows of another.
    "reference": BOTTOM,
    "eager": BOTTOM,
    "kernels": BOTTOM,
    # What both backends need is composed once, above them.
    "composed": BOTTOM,
    "backend": BOTTOM | {"composed", "eager", "kernels"},
    "autograd": BOTTOM | {"reference"},
    "optimal": ARGUMENTS,
    "functional": PUBLIC | {"optimal"},
    "objectives": ARGUMENTS,
    "latent": PUBLIC | {"objectives"},
    "foreach": PUBLIC | {"latent"},
    "drop_in": PUBLIC | {"functional"},
    "likelihoods": PUBLIC | {"functional"},
    "counts": PUBLIC | {"functional"},
    "densities": PUBLIC | {"functional"},
    "linear": PUBLIC | {"latent", "composed"},
    "estimators": PUBLIC | {"functional", "latent", "densities", "optimal"},
    "distributions": PUBLIC | {"functional", "latent"},
    "latent_diffusion": PUBLIC | {"functional", "likelihoods"},
    "modules": PUBLIC | {"functional", "latent", "drop_in", "linear", "distributions", "estimators"},
    "schedules": {"dtypes", "types"},
    "integrations": {"types", "functional", "latent", "distributions"},
    # On top of all.
    "numerics": PUBLIC
    | {
        "reference",
        "functional",
        "latent",
        "drop_in",
        "likelihoods",
        "counts",
        "densities",
        "linear",
        "distributions",
        "estimators",
        "eager",
        "kernels",
    },
    "fastelbo": {
        "schedules",
        "densities",
        "latent",
        "foreach",
        "functional",
        "drop_in",
        "likelihoods",
        "counts",
        "linear",
        "estimators",
        "distributions",
        "latent_diffusion",
        "modules",
        "numerics",
    },
    "demo": {"fastelbo", "backend", "numerics"},
    "cli": {"fastelbo", "backend", "numerics", "demo"},
    "__main__": {"cli"},
}

# One module in two files: Dynamo imports the second, which is half of `tracing.one_node`, when it gets there.
HALVES = {"fastelbo._nodes": "fastelbo.tracing"}


class Import(NamedTuple):
    module: str  # who imports
    target: str  # which module of ours
    name: str | None  # what of it: None is the module itself
    line: int

    def __str__(self) -> str:
        what = self.target if self.name is None else f"{self.name} from {self.target}"
        return f"{self.module}, line {self.line}: {what}"


def sources() -> dict[str, Path]:
    """Every file of the package by the name of its module."""
    found = {}
    for package, folder in (("fastelbo", ROOT / "fastelbo"), ("fastelbo.kernels", ROOT / "kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


SOURCES = sources()
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def base(module: str, level: int) -> str:
    """The package that a relative import of `level` dots starts from."""
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    parts = package.split(".")
    return ".".join(parts[: len(parts) - (level - 1)])


def targets(module: str, node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each import that the node makes, of any package."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            source = ".".join(filter(None, (base(module, node.level), source)))
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            yield (inner, None) if inner in SOURCES and not exports(source, alias.name) else (source, alias.name)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and isinstance(node.args[0], ast.Constant):
        yield str(node.args[0].value), None


def exports(package: str, name: str) -> bool:
    """Whether a package has something else by the name of one of its modules: `kernels.elbo` is an op, not the file."""
    return any(
        isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names)
        for node in TREES[package].body
    )


def imports(module: str) -> Iterator[Import]:
    own = HALVES.get(module, module)
    for node in ast.walk(TREES[module]):
        for target, name in targets(module, node):
            target = HALVES.get(target, target)
            if target in SOURCES and target != own:
                yield Import(own, target, name, node.lineno)


IMPORTS = [found for module in SOURCES for found in imports(module)]


def test_the_reader_sees_every_kind_of_import() -> None:
    """Or the others would pass for want of anything to look at."""
    arrows = {(i.module, i.target) for i in IMPORTS}
    assert ("fastelbo.functional", "fastelbo.autograd") in arrows  # from . import
    assert ("fastelbo.noise", "fastelbo.tracing") in arrows  # from .module import
    assert ("fastelbo.backend", "fastelbo.kernels") in arrows  # importlib
    assert ("fastelbo.cli", "fastelbo.demo") in arrows  # in a function
    assert ("fastelbo.kernels.philox", "fastelbo.kernels.math") in arrows  # in a package that lies elsewhere
    assert any(source.startswith("fastelbo.kernels.") and target == "fastelbo.specs" for source, target in arrows)  # by full name


def test_every_part_is_in_the_table() -> None:
    assert {part(HALVES.get(module, module)) for module in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_part_imports_only_what_it_may(name: str) -> None:
    wrong = [str(i) for i in IMPORTS if part(i.module) == name and part(i.target) not in ALLOWED[name] | {name}]
    assert not wrong, f"{name} may import {', '.join(sorted(ALLOWED[name])) or 'nothing'}:\n" + "\n".join(wrong)


def test_the_table_itself_is_a_hierarchy() -> None:
    tuple(graphlib.TopologicalSorter(ALLOWED).static_order())  # raises CycleError
    for backend, others in {"eager": {"kernels", "reference"}, "kernels": {"eager", "reference"}}.items():
        assert not ALLOWED[backend] & others
    assert not ALLOWED["autograd"] & {"backend", "eager", "kernels"}
    assert {name for name, may in ALLOWED.items() if "numerics" in may} <= {"fastelbo", "cli", "demo"}


def test_no_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for i in IMPORTS:
        graph[i.module].add(i.target)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.endswith("__")


def test_no_private_name_of_another_module_is_imported() -> None:
    wrong = [str(i) for i in IMPORTS if private(i.name) or private(i.target.rpartition(".")[2])]
    assert not wrong, "\n".join(wrong)


def test_no_private_name_of_another_module_is_reached_through_it() -> None:
    wrong = []
    for module, tree in TREES.items():
        ours = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for (target, name), alias in zip(targets(module, node), node.names, strict=True):
                    if name is None and target in SOURCES:
                        ours.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) in ours:
                wrong.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
