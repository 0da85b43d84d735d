"""Speed: ``python -m benchmarks.bench_NAME``. What the results claim: ``experiments/``."""
