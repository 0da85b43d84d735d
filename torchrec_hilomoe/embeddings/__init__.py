"""Step 2, KJT -> VECTORS: sharded lookups that give the backbones their sequence features."""
