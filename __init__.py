"""mnemoc: a compiler for long-context LLM serving."""
