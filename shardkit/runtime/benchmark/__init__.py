"""How fast a model runs: over ranks, unsharded, and by transformers' own tensor parallelism."""
