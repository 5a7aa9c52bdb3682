"""The HTTP server: `serve` runs it, `create_app` is its application over a running engine."""

from .app import create_app
from .conversation import Conversation, Template
from .options import Limits, Options
from .serve import bind, serve

__all__ = ["Conversation", "Limits", "Options", "Template", "bind", "create_app", "serve"]
