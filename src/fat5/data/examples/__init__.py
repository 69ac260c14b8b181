"""From shards to batches: denoisers, order, packing, loading."""
