"""Where tables go, and a model whose tables are there."""
