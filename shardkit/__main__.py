"""`python -m shardkit`, which is what `torchrun -m shardkit` runs."""

from shardkit.cli import main

if __name__ == "__main__":
    main()
