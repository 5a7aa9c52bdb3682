"""The intermediate representation: sizes, types, ops, graph, text form, verifier, interpreter, passes."""
