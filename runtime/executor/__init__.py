"""The engine's side of the workers: starts them, waits for those that others start, sends steps, and misses
whoever falls silent. No torch.
"""
