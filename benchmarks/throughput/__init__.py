"""Training throughput, taken apart: what is measured, how it is fed, timed, counted and checked."""
