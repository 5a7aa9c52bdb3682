"""A module as text, and what functions of it are expected to be as text."""

import textwrap

from mnemoc.ir.text import print_module
from mnemoc.ir.verify import verify

BEFORE = """
module "mlp" tp=1 kvp=1 {
  func @layer(%x: f32[T, 8]) {
    %norm = param {sources=["n"]} : f32[8]
    %h = rms_norm %x, %norm {eps=1e-05} : f32[T, 8]
    %w_gate = param {sources=["g"]} : f32[32, 8]
    %gate = linear %h, %w_gate : f32[T, 32]
    %w_up = param {sources=["u"]} : f32[32, 8]
    %up = linear %h, %w_up : f32[T, 32]
    %active = silu_mul %gate, %up : f32[T, 32]
    %w_down = param {sources=["d"]} : f32[8, 32]
    %down = linear %active, %w_down : f32[T, 8]
    %y = add %x, %down : f32[T, 8]
    return %y
  }

  program main(%x: f32[T, 8]) {
    %x1 = @layer[0:4](%x)
    return %x1
  }
}
"""


def body(module, name="layer"):
    text = print_module(module)
    start = text.index(f"func @{name}")
    return textwrap.dedent("  " + text[start : text.index("\n  }", start)]).splitlines()[1:]


def expect(module, lines, name="layer"):
    wanted = [line.strip() for line in textwrap.dedent(lines).strip().splitlines()]
    assert [line.strip() for line in body(verify(module), name)] == wanted
