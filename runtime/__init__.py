"""The run time: loads a verified artifact, runs one worker per rank, turns requests into tokens.

The engine's process needs no torch; the workers do. It knows no target: it runs what it loads.
"""

from .engine import Engine
from .request import Handle, Progress, Request, Sampling, Token

__all__ = ["Engine", "Handle", "Progress", "Request", "Sampling", "Token"]
