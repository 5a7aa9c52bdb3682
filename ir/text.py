"""The text form, which round-trips: parse(print_module(m)) == m.

    module   = 'module' STRING 'tp' '=' INT 'kvp' '=' INT '{' function* program+ '}'
    function = 'func' '@' NAME '(' params ')' '{' op* 'return' values '}'
    op       = values '=' NAME values? attrs? ':' type (';' type)*
    program  = 'program' NAME '(' params ')' '{' call* 'return' values '}'
    call     = values '=' '@' NAME ('[' INT ':' INT ']')? '(' values ')' ('or' '@' NAME)?
    params   = '%' NAME ':' type (',' …)*           values = '%' NAME (',' …)*
    attrs    = '{' NAME '=' JSON (',' …)* '}'
    type     = DTYPE '[' size ('@' AXIS)? (',' …)* ']' ('+' KIND '(' AXIS ')')?
    size     = an integer, or an expression of the symbols T, R, QK, KV, KD, X

One op or call a line; `#` starts a comment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import sympy

from ..errors import BadInput
from .graph import Attr, Call, Function, Module, Op, Program, Value
from .sizes import SYMBOLS, Size, normal
from .types import Partial, TensorType

# --------------------------------------------------------------------------------------- printing


def print_module(module: Module) -> str:
    """The module as text."""
    mesh = " ".join(f"{axis}={module.mesh[axis]}" for axis in ("tp", "kvp"))
    parts = [print_function(function) for function in module.functions.values()]
    parts += [_print_program(program) for program in module.programs]
    body = "\n\n".join(parts)
    indented = "\n".join(f"  {line}" if line else "" for line in body.splitlines())
    return f"module {json.dumps(module.name)} {mesh} {{\n{indented}\n}}\n"


def print_function(function: Function) -> str:
    lines = [f"  {print_op(op)}" for op in function.ops]
    head = f"func @{function.name}({_print_params(function.params)}) {{"
    return "\n".join((head, *lines, f"  return {_print_values(function.returns)}", "}"))


def print_op(op: Op) -> str:
    """One op as one line."""
    text = f"{_print_values(v.name for v in op.results)} = {op.name}"
    if op.operands:
        text += f" {_print_values(op.operands)}"
    if op.attrs:
        items = (f"{key}={json.dumps(op.attrs[key])}" for key in sorted(op.attrs))
        text += f" {{{', '.join(items)}}}"
    return f"{text} : {'; '.join(str(value.type) for value in op.results)}"


def print_call(call: Call) -> str:
    """One call as one line."""
    layers = f"[{call.layers[0]}:{call.layers[1]}]" if call.layers else ""
    operands = _print_values(call.operands)
    halved = f" or @{call.halved}" if call.halved else ""
    return f"{_print_values(call.results)} = @{call.function}{layers}({operands}){halved}"


def _print_program(program: Program) -> str:
    lines = [f"  {print_call(call)}" for call in program.calls]
    head = f"program {program.name}({_print_params(program.params)}) {{"
    return "\n".join((head, *lines, f"  return {_print_values(program.returns)}", "}"))


def _print_params(params: tuple[Value, ...]) -> str:
    return ", ".join(f"%{value.name}: {value.type}" for value in params)


def _print_values(names: Iterator[str] | tuple[str, ...]) -> str:
    return ", ".join(f"%{name}" for name in names)


# ---------------------------------------------------------------------------------------- parsing

_MODULE = re.compile(r'module ("(?:[^"\\]|\\.)*") tp=(\d+) kvp=(\d+) \{')
_FUNCTION = re.compile(r"func @(\w+)\((.*)\) \{")
_PROGRAM = re.compile(r"program (\w+)\((.*)\) \{")
_RETURN = re.compile(r"return (%.+)")
_OP = re.compile(r"(%[^=]+?) = (\w+)((?: %\w+,?)*)(?: (\{.*\}))? : (\S.*)")
_CALL = re.compile(r"(%[^=]+?) = @(\w+)(?:\[(\d+):(\d+)\])?\(([^)]*)\)(?: or @(\w+))?")
_TYPE = re.compile(r"(\w+)\[(.*)\](?:\+(\w+)\((\w+)\))?")
_SIZE = re.compile(r"[\w\s*/+()-]+")
_SYMBOLS = {symbol.name: symbol for symbol in SYMBOLS}


class _Lines:
    """The text's lines, without comments and blank lines, and where we are in them."""

    def __init__(self, text: str, where: str) -> None:
        stripped = ((n, line.split("#")[0].strip()) for n, line in enumerate(text.splitlines(), 1))
        self.lines = [(n, line) for n, line in stripped if line]
        self.where, self.index = where, 0

    def peek(self) -> str:
        return self.lines[self.index][1] if self.index < len(self.lines) else ""

    def take(self, pattern: re.Pattern[str], wanted: str) -> re.Match[str]:
        match = pattern.fullmatch(self.peek())
        if match is None:
            raise self.error(f"expected {wanted}")
        self.index += 1
        return match

    def error(self, what: str) -> BadInput:
        number = self.lines[min(self.index, len(self.lines) - 1)][0] if self.lines else 1
        return BadInput(what, where=f"{self.where}:{number}", got=self.peek())


_CLOSE = re.compile(r"\}")


def parse(text: str, where: str = "IR text") -> Module:
    """Text → Module. Malformed text is BadInput with its line; validity is the verifier's business."""
    lines = _Lines(text, where)
    head = lines.take(_MODULE, 'module "NAME" tp=N kvp=N {')
    functions, programs = {}, []
    while lines.peek().startswith("func"):
        function = _parse_function(lines)
        functions[function.name] = function
    while lines.peek().startswith("program"):
        programs.append(_parse_program(lines))
    lines.take(_CLOSE, "func, program or }")
    if lines.peek():
        raise lines.error("expected the end of the text")
    mesh = {"tp": int(head[2]), "kvp": int(head[3])}
    return Module(json.loads(head[1]), functions, tuple(programs), mesh)


def _parse_function(lines: _Lines) -> Function:
    head = lines.take(_FUNCTION, "func @NAME(%x: type, …) {")
    params, ops = _parse_params(lines, head[2]), []
    while lines.peek().startswith("%"):
        ops.append(_parse_op(lines))
    returns = lines.take(_RETURN, "return %value, …")
    lines.take(_CLOSE, "}")
    return Function(head[1], params, tuple(ops), _parse_values(returns[1]))


def _parse_op(lines: _Lines) -> Op:
    match = lines.take(_OP, "%value = op %operand, … {attrs} : type")
    names = _parse_values(match[1])
    types = tuple(_parse_type(lines, text) for text in match[5].split("; "))
    if len(names) != len(types):
        raise lines.error(f"{len(names)} results but {len(types)} types")
    results = tuple(Value(name, type) for name, type in zip(names, types, strict=True))
    return Op(match[2], _parse_values(match[3]), _parse_attrs(lines, match[4]), results)


def _parse_attrs(lines: _Lines, text: str | None) -> dict[str, Attr]:
    if text is None:
        return {}
    quoted = re.sub(r"(?<=[{ ])(\w+)=", r'"\1": ', text)
    try:
        attrs = json.loads(quoted)
    except ValueError as error:
        raise lines.error(f"the attributes are malformed: {error}") from error
    return {key: tuple(v) if isinstance(v, list) else v for key, v in attrs.items()}


def _parse_program(lines: _Lines) -> Program:
    head = lines.take(_PROGRAM, "program NAME(%x: type, …) {")
    params, calls = _parse_params(lines, head[2]), []
    while lines.peek().startswith("%"):
        match = lines.take(_CALL, "%value = @function(%operand, …)")
        layers = (int(match[3]), int(match[4])) if match[3] else None
        operands, results = _parse_values(match[5]), _parse_values(match[1])
        calls.append(Call(match[2], operands, results, layers, match[6]))
    returns = lines.take(_RETURN, "return %value, …")
    lines.take(_CLOSE, "}")
    return Program(head[1], params, tuple(calls), _parse_values(returns[1]))


def _parse_values(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%(\w+)", text))


def _parse_params(lines: _Lines, text: str) -> tuple[Value, ...]:
    pairs = re.findall(r"%(\w+): ((?:[^,\[]|\[[^\]]*\])+)", text)
    return tuple(Value(name, _parse_type(lines, type)) for name, type in pairs)


def _parse_type(lines: _Lines, text: str) -> TensorType:
    match = _TYPE.fullmatch(text.strip())
    if match is None:
        raise lines.error(f"{text!r} is no type")
    dims = [dim.strip().partition("@") for dim in match[2].split(",")] if match[2] else []
    sizes = tuple(_parse_size(lines, size) for size, _, _ in dims)
    axes = tuple(axis or None for _, _, axis in dims)
    partial = Partial(match[3], match[4]) if match[3] else None
    return TensorType(match[1], sizes, axes, partial)


def _parse_size(lines: _Lines, text: str) -> Size:
    if text.isdigit():
        return int(text)
    names = set(re.findall(r"[A-Za-z_]\w*", text))
    if not _SIZE.fullmatch(text) or names - _SYMBOLS.keys():
        raise lines.error(f"{text!r} is no size")
    try:
        return normal(sympy.sympify(text, locals=_SYMBOLS))
    except (sympy.SympifyError, TypeError, SyntaxError) as error:
        raise lines.error(f"{text!r} is no size") from error
