"""The verifier: the rules of the IR as code. Run after every pass.

A function is valid if
    every operand is defined before it is used, and every name once
    every op is known, with the right number of operands and exactly its attributes
    every result type is the one that the op's own rule infers
    only declared ops (param, cache) carry a type of their own, and it is not partial
    every placement is over tp, over kvp, or over tp_kvp
A program is valid if
    every call names a function, its operands are defined and of the function's parameter types
    the results of a call that is repeated over several layers fit the operands that they replace
    what a call names for halves is a function of the same parameter and result types
"""

from __future__ import annotations

from .graph import Call, Function, Module, Op, Program, Value
from .ops import OPS, TypeRule, infer
from .text import print_op
from .types import AXES, PRODUCT, TensorType


class VerifyError(Exception):
    """The IR is broken: a fault of the pass that made it. Shows the offending op among its neighbours."""


def verify(module: Module) -> Module:
    """The module itself, if it is valid."""
    if set(module.mesh) != set(AXES):
        raise VerifyError(f"module {module.name}: the mesh has the axes {sorted(module.mesh)}")
    for function in module.functions.values():
        _verify_function(function, module)
    for program in module.programs:
        _verify_program(program, module)
    return module


def _verify_function(function: Function, module: Module) -> None:
    types = {value.name: value.type for value in function.params}
    for index, op in enumerate(function.ops):
        try:
            _verify_op(op, types, module)
        except TypeRule as rule:
            raise VerifyError(
                f"@{function.name}: {rule}\n{_neighbourhood(function, index)}"
            ) from rule
        types.update((value.name, value.type) for value in op.results)
    for name in function.returns:
        if name not in types:
            raise VerifyError(f"@{function.name} returns %{name}, which it does not define")


def _verify_op(op: Op, types: dict[str, TensorType], module: Module) -> None:
    if op.name not in OPS:
        raise TypeRule(f"there is no op {op.name!r}")
    definition = OPS[op.name]
    least, most = definition.arity
    if not least <= len(op.operands) <= most:
        raise TypeRule(f"{op.name} takes ({definition.signature}), not {len(op.operands)} operands")
    for name in op.operands:
        if name not in types:
            raise TypeRule(f"%{name} is used before it is defined")
    for value in op.results:
        _verify_result(value, types)
    given = op.attrs.keys() - {"kernel"} - definition.optional.keys()
    if given != definition.attrs.keys():
        raise TypeRule(
            f"{op.name} has the attributes {list(definition.attrs)}, not {list(op.attrs)}"
        )
    for key, kind in {**definition.attrs, **definition.optional}.items():
        if key in op.attrs and not isinstance(op.attrs[key], kind):
            raise TypeRule(f"{key} must be of type {kind.__name__}")
    if definition.infer is None:
        if op.type.partial is not None:
            raise TypeRule(f"{op.name} cannot be partial: {op.type}")
        return
    inferred = infer(op.name, tuple(types[name] for name in op.operands), op.attrs, module.mesh)
    stored = tuple(value.type for value in op.results)
    if inferred != stored:
        raise TypeRule(f"the type is {_join(inferred)}, but {_join(stored)} is written")


def _verify_result(value: Value, types: dict[str, TensorType]) -> None:
    if value.name in types:
        raise TypeRule(f"%{value.name} is defined twice")
    if unknown := {axis for axis in value.type.axes if axis} - {*AXES, PRODUCT}:
        raise TypeRule(f"%{value.name} is placed over {min(unknown)}, which is no axis")


def _verify_program(program: Program, module: Module) -> None:
    types = {value.name: value.type for value in program.params}
    for call in program.calls:
        function = module.functions.get(call.function)
        if function is None:
            raise VerifyError(f"program {program.name} calls @{call.function}, which is not there")
        _verify_call(call, module, types, program)
        types.update(zip(call.results, function.result_types, strict=True))
    for name in program.returns:
        if name not in types:
            raise VerifyError(f"program {program.name} returns %{name}, which it does not define")


def _verify_call(
    call: Call, module: Module, types: dict[str, TensorType], program: Program
) -> None:
    function = module.functions[call.function]
    where = f"program {program.name}, @{call.function}"
    for name in call.operands:
        if name not in types:
            raise VerifyError(f"{where}: %{name} is used before it is defined")
    given = tuple(types[name] for name in call.operands)
    wanted = tuple(value.type for value in function.params)
    if given != wanted:
        raise VerifyError(f"{where} takes ({_join(wanted)}), not ({_join(given)})")
    if len(call.results) != len(function.returns):
        raise VerifyError(f"{where} returns {len(function.returns)} values")
    if call.halved is not None:
        other = module.functions.get(call.halved)
        if other is None or (other.params, other.result_types) != (
            function.params,
            function.result_types,
        ):
            raise VerifyError(f"{where} and @{call.halved} are not alike")
    if call.layers is not None:
        first, end = call.layers
        if not 0 <= first <= end:
            raise VerifyError(f"{where}: the layers {first}:{end} are no range")
        if call.count > 1 and function.result_types != given[: len(function.returns)]:
            raise VerifyError(f"{where} is repeated, but its results do not fit its operands")


def _neighbourhood(function: Function, index: int) -> str:
    first = max(0, index - 3)
    lines = (
        f"{'>' if i == index else ' '} {print_op(op)}"
        for i, op in enumerate(function.ops[first : index + 3], first)
    )
    return "\n".join(lines)


def _join(types: tuple[TensorType, ...]) -> str:
    return ", ".join(map(str, types))
