"""Who may import whom: dependencies point one way, and foreign private API is behind one door each."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import networkx
import pytest

from tests import _tree

PACKAGE = "steer_compile"

FOUNDATION = ("_version", "errors", "hooks", "spec", "ir", "torch_compat", "watch")
"""Values and doors at the bottom: they import one another and nothing above."""

APPLICATIONS = ("cli", "coverage", "demo", "sweep")
"""What is built on the library; the library never imports it."""

FORBIDDEN = {
    "backend": ("sae",),
    "kernels": ("passes", "runtime", "dynamic", "sae", "vllm", *APPLICATIONS),
    "passes": ("runtime", "dynamic", "sae", "vllm", *APPLICATIONS),
    "runtime": ("passes", "dynamic", "capture", "vllm", *APPLICATIONS),
    "capture": ("passes", "kernels", "backend", "dynamic", "sae", "vllm", *APPLICATIONS),
    "dynamic": ("passes", "kernels", "backend", "sae", "vllm", *APPLICATIONS),
    "sae": ("passes", "kernels", "backend", "dynamic", "vllm", *APPLICATIONS),
    "vllm": APPLICATIONS,
    "debug": ("dynamic", "sae", "vllm", *APPLICATIONS),
    "sweep": ("passes", "kernels", "dynamic", "sae", "vllm", "cli", "coverage", "demo"),
}
"""Part of the package -> the parts that it does not import."""

SHARED_WITH_SAE = ("capture.rows", "runtime.vectors", "runtime.gates")
"""What autoencoders know of the parts that make rows and take vectors: values alone."""

SHARED_WITH_RUNTIME = ("model", "packing", "steer", "checks")
"""What the runtime knows of autoencoders: values, and their numbers as kernels read them."""

SHARED_BY_PASSES = ("buffers", "dataflow", "residual", "spine", "blocks", "segments", "branch_ends", "layout", "norms",
                    "streams")  # fmt: skip
"""Parts of the search for the residual stream: passes import these, and these import no pass."""

BEHIND_A_DOOR = (
    "kernels/site.py",
    "kernels/site_kernels.py",
    "kernels/site_wide.py",
    "kernels/gate_kernels.py",
    "kernels/sae_formula.py",
    "kernels/sae_full_decode.py",
    "kernels/sae_full_keys.py",
    "kernels/sae_full_kernels.py",
    "kernels/sae_full_launch.py",
    "kernels/sae_full_select.py",
    "kernels/sae_full_warmup.py",
    "kernels/sae_stage.py",
    "steer_compile/capture/arrow.py",
    "steer_compile/dynamic/prometheus.py",
    "steer_compile/vllm/metrics.py",
    "steer_compile/vllm/requests.py",
    "steer_compile/vllm/server/plugin.py",
)
"""Modules that are imported only where their extra is there: the template, which needs Triton; parquet; what vLLM
calls."""

ADAPTERS = Path("steer_compile/vllm/adapters")
"""What leans on vLLM, and is imported when vLLM calls the plugin."""

LOOKS_UNDER_THE_HOOD = ("tests", "benchmarks")
"""Top-level folders that may use private torch API and vLLM directly."""


class Import(NamedTuple):
    path: Path
    line: int
    name: str
    """Dotted name: a module, or an attribute of one."""
    deferred: bool
    """Inside a function or under TYPE_CHECKING: it does not run when the module is imported."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name}"


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute):
        name = ast.unparse(node)
        return [name] if name.startswith("torch.") and name.replace(".", "").isidentifier() else []
    return []


def imports(path: Path, source: str) -> Iterator[Import]:
    """Every import of a file, and every dotted use of torch, which reaches as far as an import does."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        for name in _names(node):
            assert isinstance(node, ast.expr | ast.stmt)
            yield Import(path, node.lineno, name, deferred)
        deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        deferred = deferred or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred)

    return visit(ast.parse(source), False)


def part_of(name: str) -> str:
    """The part of the package that a dotted name belongs to: "passes" for steer_compile.passes.splice."""
    head, _, rest = name.partition(".")
    return rest.split(".")[0] if head == PACKAGE else ""


def _is_private_torch(name: str) -> bool:
    head, *rest = name.split(".")
    return head == "torch" and any(part.startswith("_") and not part.endswith("__") for part in rest)


def breach(found: Import) -> str | None:
    """The rule that an import breaks, if it breaks one."""
    part, target = part_of(_tree.module_name(found.path)), part_of(found.name)
    top = found.name.split(".")[0]
    outside = found.path.parts[0] in LOOKS_UNDER_THE_HOOD
    rules = {
        f"import {PACKAGE}.{top}, its one name": top in _tree.LINKED,
        "private torch API belongs in steer_compile/torch_compat.py": _is_private_torch(found.name)
        and part != "torch_compat"
        and not outside,
        "only steer_compile/vllm imports vllm": top == "vllm" and part != "vllm" and not outside,
        f"{part} is at the bottom and imports only {', '.join(FOUNDATION)}": part in FOUNDATION
        and bool(target)
        and target not in FOUNDATION,
        f"{part} does not import {target}": target in FORBIDDEN.get(part, ()),
        f"sae imports of {target} only {', '.join(SHARED_WITH_SAE)}": part == "sae"
        and target in ("capture", "runtime")
        and ".".join(found.name.split(".")[1:3]) not in SHARED_WITH_SAE,
        f"runtime imports of sae only {', '.join(SHARED_WITH_RUNTIME)}": part == "runtime"
        and target == "sae"
        and found.name.split(".")[2] not in SHARED_WITH_RUNTIME,
        "the package imports no tests": top == "tests" and bool(part),
        "a pass imports no other pass, only what all share": part == target == "passes"
        and found.name.split(".")[2] not in SHARED_BY_PASSES,
    }
    return next((rule for rule, broken in rules.items() if broken), None)


def _all_imports() -> list[Import]:
    return [
        found for path in _tree.files(".py") for found in imports(path, (_tree.ROOT / path).read_text(encoding="utf-8"))
    ]


def test_imports_keep_the_rules() -> None:
    report = [f"{found}: {rule}" for found in _all_imports() if (rule := breach(found))]
    assert not report, "\n".join(report)


def test_modules_form_no_import_cycle() -> None:
    modules = {_tree.module_name(path) for path in _tree.files(".py")}
    graph = networkx.DiGraph()
    for found in _all_imports():
        target = found.name if found.name in modules else found.name.rpartition(".")[0]
        if target in modules and not found.deferred:
            graph.add_edge(_tree.module_name(found.path), target)
    assert list(networkx.simple_cycles(graph)) == []


def _names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}


def test_what_the_package_imports_is_declared() -> None:
    """The library imports its dependencies; only applications and deferred imports may need an extra."""
    project = tomllib.loads((_tree.ROOT / "pyproject.toml").read_text())["project"]
    declared = _names_of(project["dependencies"])
    optional = _names_of(sum(project["optional-dependencies"].values(), []))
    report = []
    for found in _all_imports():
        top, part = found.name.split(".")[0], part_of(_tree.module_name(found.path))
        extras_too = found.deferred or part in APPLICATIONS or str(found.path) in BEHIND_A_DOOR
        extras_too = extras_too or ADAPTERS in found.path.parents
        if part and top not in {PACKAGE, *sys.stdlib_module_names, *declared, *(optional if extras_too else ())}:
            report.append(str(found))
    assert not report, "not among the dependencies of pyproject.toml:\n" + "\n".join(report)


def test_every_named_module_exists() -> None:
    """A rule about a file that was renamed would hold without saying anything."""
    missing = [name for name in SHARED_BY_PASSES if not (_tree.ROOT / "passes" / f"{name}.py").is_file()]
    assert missing == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("steer_compile/ir.py", "from steer_compile.passes.spine import x", "ir is at the bottom"),
        ("steer_compile/spec.py", "import steer_compile.runtime", "spec is at the bottom"),
        ("passes/splice.py", "def f():\n    from steer_compile import runtime", "passes does not import runtime"),
        ("passes/splice.py", "from steer_compile.passes.find_sites import x", "a pass imports no other pass"),
        ("passes/spine.py", "from steer_compile.passes.find_sites import x", "a pass imports no other pass"),
        ("kernels/add.py", "from steer_compile.passes import spine", "kernels does not import passes"),
        ("steer_compile/runtime/tables.py", "import steer_compile.cli.main", "runtime does not import cli"),
        ("steer_compile/runtime/runtime.py", "import steer_compile.dynamic.plain", "runtime does not import dynamic"),
        ("steer_compile/dynamic/plain.py", "import steer_compile.vllm.rows", "dynamic does not import vllm"),
        ("steer_compile/sae/model.py", "import steer_compile.kernels.site", "sae does not import kernels"),
        ("steer_compile/sae/model.py", "import steer_compile.capture.read", "sae imports of capture only"),
        ("steer_compile/runtime/tables.py", "import steer_compile.sae.files", "runtime imports of sae only"),
        ("steer_compile/backend.py", "import torch._inductor.config", "private torch API"),
        ("steer_compile/backend.py", "from torch import _dynamo", "private torch API"),
        ("steer_compile/backend.py", "import torch\ntorch._dynamo.reset()", "private torch API"),
        ("steer_compile/backend.py", "import vllm.config", "only steer_compile/vllm imports vllm"),
        ("steer_compile/backend.py", "from tests import _toys", "the package imports no tests"),
        ("tests/test_a.py", "from passes.spine import x", "import steer_compile.passes, its one name"),
        ("benchmarks/run.py", "import kernels", "import steer_compile.kernels, its one name"),
    ],
)
def test_a_breach_is_found(path: str, source: str, rule: str) -> None:
    rules = [breach(found) or "" for found in imports(Path(path), source)]
    assert any(found.startswith(rule) for found in rules), rules


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("steer_compile/torch_compat.py", "import torch._dynamo\nfrom steer_compile.errors import SpecError"),
        ("steer_compile/backend.py", "import torch\nprint(torch.__version__, torch.fx.Node)"),
        ("steer_compile/vllm/plugin.py", "import vllm\nfrom steer_compile.runtime import tables"),
        ("passes/splice.py", "from steer_compile.passes.dataflow import x\nfrom steer_compile.ir import Plan"),
        ("passes/splice.py", "from steer_compile.passes import spine"),
        ("tests/test_a.py", "import torch._dynamo\nfrom steer_compile.passes.find_sites import find_sites"),
    ],
)
def test_a_rightful_import_passes(path: str, source: str) -> None:
    assert [breach(found) for found in imports(Path(path), source) if breach(found)] == []
