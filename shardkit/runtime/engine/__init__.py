"""The ranks of one model as one engine: rank processes, their worker, and what controls them."""
