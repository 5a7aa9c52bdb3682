"""What the engine tells of itself: counts, histograms, snapshots, traces. It decides nothing."""
