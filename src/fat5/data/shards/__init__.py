"""Token shards: `fat5 prepare` writes them, training reads them."""
