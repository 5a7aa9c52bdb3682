"""One rank: a process that loads its stage of a plan and carries out micro-batches. Here, and in `measuring`,
is torch.
"""
