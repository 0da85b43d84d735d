"""What surrounds a run: ranks, seeds, paths, and the way the process was launched."""
