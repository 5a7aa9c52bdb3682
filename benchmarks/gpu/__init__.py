"""`python -m benchmarks.gpu --out DIR`: the kernels and programs that plans emit, measured on a GPU.

Runs from a bare checkout: Python, torch and triton, nothing installed, no network. What is measured, how,
and what the figures mean is in docs/measuring.md.

    checkout   makes this checkout importable as `mnemoc`     device    what differs between a GPU and the CPU
    main       the command line                                work      operations and bytes, by formula
    runner     sections, budgets, resuming                     kernels   emitted kernels, caches, segments
    report     JSON → Markdown                                 baselines others' attention kernels
    ceilings, correctness, prefill, decode, rows, tiles, calibrate, stage     one section each
"""
