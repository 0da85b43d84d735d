"""What ``benchmarks.on_gpu`` checks and measures, one part a file."""
