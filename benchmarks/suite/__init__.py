"""The benchmarks: one module per group, and what they share."""
