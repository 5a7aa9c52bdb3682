"""Which rows are computed next, whose prompt goes first, who holds which pages, when a first token will come.

Pure policy over integers: no torch, no processes, no clock of its own. The engine on a virtual clock
(`simulation`) runs this very code.
"""
