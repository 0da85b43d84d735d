"""Ours beside others' training, of the same model, on the same batches."""
