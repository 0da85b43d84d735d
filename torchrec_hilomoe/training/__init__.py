"""Step 6, MODEL -> TRAINED MODEL: stages, optimizers, sharding, the loop, checkpoints, metrics."""
