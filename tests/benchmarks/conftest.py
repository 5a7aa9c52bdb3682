"""Loads benchmarks/gpu, which no wheel has, from the checkout; and runs it there as a command."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
NAME = "gpu_benchmarks"


@pytest.fixture(scope="session")
def gpu() -> Callable[[str], ModuleType]:
    """`gpu("work")`: a module of benchmarks/gpu."""
    folder = ROOT / "benchmarks" / "gpu"
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)
    return lambda name: importlib.import_module(f"{NAME}.{name}")
