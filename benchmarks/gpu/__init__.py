"""`python -m benchmarks.gpu --out DIR`: the kernels and programs that plans emit, measured on a GPU.

Runs from a bare checkout: Python, torch and triton, nothing installed, no network. What is measured, how,
and what the figures mean is in docs/measuring.md.

    checkout   makes this checkout importable as `mnemoc`      device     what a GPU and the CPU differ in
    main       the command line                                timing     contenders in turn, medians
    runner     sections, cases, budgets, resuming              work       operations and bytes, by formula
    sizes      what is measured, full and tiny                 reference  float64, from the definitions
    report     JSON → Markdown                                 kernels    emitted kernels, caches, segments
    attending  ours beside others' attention                   baselines  others' attention
    rowwise    calls of the row-wise kernels and the merge     plans      plans whose stages are replayed

    ceilings, compiling, correctness, prefill, decode, rows, calibrate, stage, tiles: one section each
"""
