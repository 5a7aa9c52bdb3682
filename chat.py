"""A model's own chat template: the jinja2 program in its folder that turns a conversation into text.

Written as transformers runs them: sandboxed and immutable, blocks trimmed, with `raise_exception`,
`strftime_now`, `tojson`, `break` and `continue`, and `{% generation %}`, which marks what the assistant says
and changes nothing. The template comes from the operator, the conversation from anybody: so a conversation
must not make it loop for long or swell. Each turn of a loop looks at the clock, and whatever joins, adds or
multiplies texts and numbers looks at the size; filters that pad are the template's own affair.

The run time does not load jinja2: the shell hands it `ChatTemplate` as a function.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .errors import BadInput
from .runtime.server import Conversation

FILE, CONFIG, KEY = "chat_template.jinja", "tokenizer_config.json", "chat_template"
DEFAULT = "default"

RENDER_S = 5.0
"""A conversation of ten thousand turns takes a fraction of a second."""

MOST_CHARACTERS = 2**28
MOST_BITS = 4096


class ChatTemplate:
    """Called with a conversation, it returns the text that the model reads. In any thread."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: Path) -> None:
        """tokens: the special ones, by the names that templates use. BadInput: not a template."""
        self._where = where
        self._tokens = tokens
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = _Watched().visit(environment.parse(source))
            self._template = environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            raise BadInput(f"not a chat template: {error}", where=where) from error

    def __call__(self, talk: Conversation) -> str:
        """Raises BadInput with the template's own words, or ours, if it does not take the conversation."""
        told = {
            **self._tokens,
            "tools": None,
            "documents": None,
            **talk.more,
            "messages": [dict(turn) for turn in talk.turns],
            "add_generation_prompt": talk.go_on,
            _TICK: _Watch(),
        }
        try:
            return self._template.render(told)
        except Exception as error:  # of a program that is not ours, fed with anything
            reason = str(error) or type(error).__name__
            raise BadInput(f"the chat template says: {reason}", where="messages") from error


def load(weights: Path, file: Path | None = None) -> ChatTemplate | None:
    """The template of a model folder, or the one in `file`; None if there is none.

    BadInput: a file that is not readable, JSON or a template.
    """
    path = file or weights / FILE
    config = _config(weights / CONFIG)
    tokens = {
        name: text
        for name, value in config.items()
        if name.endswith("_token")
        and isinstance(text := value.get("content") if isinstance(value, dict) else value, str)
    }
    if file is not None or path.is_file():
        return ChatTemplate(_read(path), tokens, path)
    source = config.get(KEY)
    if isinstance(source, list):  # several, each with a name
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get(DEFAULT)
    return ChatTemplate(source, tokens, weights / CONFIG) if isinstance(source, str) else None


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise BadInput(f"not JSON: {error}", where=path) from error
    return config if isinstance(config, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8: {error}", where=path) from error


# ------------------------------------------------------------------------------ what templates call


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As it stands: jinja2's own would write < and & for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """{% generation %}…{% endgeneration %}: what stands between, as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# --------------------------------------------------------------------------------------- the bounds

_TICK = "_mnemoc_tick"
_JOIN = "_mnemoc_join"


class _Watch:
    """Called in each turn of a loop; raises when the time is over."""

    def __init__(self) -> None:
        self._until_s = time.monotonic() + RENDER_S

    def __call__(self) -> None:
        if time.monotonic() > self._until_s:
            raise TemplateError(f"it did not end within {RENDER_S:g} s")


class _Watched(NodeTransformer):
    """Puts a call of the watch into each loop, and one that measures in place of each `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (found by this name)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(_TICK, [])))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call(_JOIN, node.nodes)


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which also looks at how large a result would be before it is made."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals[_JOIN] = _join

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > MOST_CHARACTERS:
            raise TemplateError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> int:
    """About as many characters, items or bits as the result will have, where that can be many."""
    lengths = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
    if operator == "+":
        return sum(lengths)
    if operator == "*":
        factors = [value for value in (left, right) if isinstance(value, int)]
        return lengths[0] * factors[0] if lengths and factors else 0
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return 0 if left.bit_length() * right <= MOST_BITS else MOST_CHARACTERS + 1
    return 0


def _join(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise TemplateError("the result of ~ would be too large")
    return "".join(texts)
