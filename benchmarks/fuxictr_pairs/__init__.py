"""A backbone twice, ours and FuxiCTR's: the same widths, the same weights, the same batches."""
