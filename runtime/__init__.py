"""The run time: loads a verified artifact, runs one worker per rank, turns requests into tokens.

The engine's process needs no torch; the workers do. It knows no target: it runs what it loads. What is named
here is imported when it is asked for: who only loads or times kernels needs no ZeroMQ.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .request import Handle, Progress, Request, Sampling, Token

__all__ = ["Engine", "Handle", "Progress", "Request", "Sampling", "Token"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(".engine" if name == "Engine" else ".request", __name__)
    return getattr(module, name)
