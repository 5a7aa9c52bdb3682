"""The packages import in one direction only, and what must stay light stays light."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mnemoc
import pytest

ROOT = Path(mnemoc.__file__).parent
LEAVES = {
    "alternatives",
    "artifact",
    "codec",
    "errors",
    "folder",
    "layout",
    "microbatch",
    "speeds",
    "tiles",
    "timeline",
    "units",
    "whole",
    "wording",
}
MAY_IMPORT = {
    "ir": LEAVES | {"ir"},
    "planner": LEAVES | {"planner", "ir"},
    "codegen": LEAVES | {"codegen", "ir"},
    "runtime": LEAVES | {"runtime"},
}
ROOMS = {  # of the runtime: which of its other rooms and files each may import
    "protocol": {"request"},
    "scheduling": {"request", "protocol"},
    "telemetry": {"request", "protocol", "scheduling"},
    "executor": {"request", "protocol"},
    "rank": {"request", "protocol", "scheduling", "loader"},
    "measuring": {"request", "protocol", "scheduling", "executor", "rank", "loader"},
    "simulation": {"request", "protocol", "scheduling", "telemetry", "flights"},
}
HEAVY_AT_RUN_TIME = {"sympy", "networkx", "scipy", "jinja2", "highspy"}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports, whether at its top or late."""
    package = ("mnemoc", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules(package: str) -> list[Path]:
    return [p for p in (ROOT / package).rglob("*.py") if "templates" not in p.parts]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    for path in modules(package):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("mnemoc.")}
        assert ours <= MAY_IMPORT[package], f"{path}: {ours - MAY_IMPORT[package]}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_the_runtime_imports_only_those_named(room: str) -> None:
    for path in modules(f"runtime/{room}"):
        ours = {name.split(".")[2] for name in imports(path) if name.startswith("mnemoc.runtime.")}
        assert ours <= ROOMS[room] | {room}, f"{path}: {ours - ROOMS[room] - {room}}"


def test_the_runtime_never_loads_what_only_compiling_needs() -> None:
    for path in modules("runtime"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & HEAVY_AT_RUN_TIME, f"{path}: {roots & HEAVY_AT_RUN_TIME}"


def test_leaves_import_nothing_of_ours_but_leaves() -> None:
    for leaf in LEAVES:
        ours = {n.split(".")[1] for n in imports(ROOT / f"{leaf}.py") if n.startswith("mnemoc.")}
        assert ours <= LEAVES


def loaded_by(*arguments: str) -> set[str]:
    """Top-level modules in memory after `mnemoc ARGUMENTS`."""
    program = (
        "import json, sys\n"
        "from mnemoc.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as leaving:\n    code = leaving.code\n"
        "print(json.dumps([code, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    code, names = json.loads(run.stdout.splitlines()[-1])
    assert code == 0, run.stderr
    return set(names)


def test_simulating_loads_no_torch(tmp_path: Path) -> None:
    promise = ("--context", "16K", "--ttft", "1h", "--tbt", "10s", "--no-calibrate")
    where = ("--cluster", "local", "--gpus", "1", "-o", str(tmp_path / "plan"))
    loaded_by("plan", "tiny-llama", *promise, *where)
    loaded = loaded_by(
        "simulate", str(tmp_path / "plan"), "--workload", "sharegpt", "--duration", "20s"
    )
    assert not loaded & {"torch", "zmq", "sympy", "networkx", "scipy", "jinja2", "transformers"}


def test_help_loads_next_to_nothing() -> None:
    heavy = {"torch", "numpy", "sympy", "networkx", "scipy", "jinja2", "rich", "transformers"}
    assert not loaded_by("--help") & heavy
