"""Cut a Hugging Face checkpoint into tensor-parallel shards, prove them right, and run them.

The package imports nothing heavy: `from shardkit import runtime` is where torch is loaded.
"""

__version__ = "0.1.0"
