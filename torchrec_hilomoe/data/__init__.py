"""Step 1 of the flow: records become batches.

``prepare`` turns raw files into a folder of Parquet and a schema; a ``BlockSource`` gives
random access to its row groups (or to generated ones); ``Loader`` puts their rows in the order of
an epoch, shares them over the ranks and collates them into ``CTRBatch``.
"""
