"""Benchmarks: run one with ``python -m benchmarks.bench_NAME``."""
