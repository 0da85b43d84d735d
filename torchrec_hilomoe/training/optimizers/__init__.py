"""Who learns, how fast, and in which precision."""
