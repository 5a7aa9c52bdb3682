"""The HTTP server: `serve` runs it, `create_app` is its application over a running engine."""

from .app import create_app
from .options import Options
from .serve import bind, serve

__all__ = ["Options", "bind", "create_app", "serve"]
