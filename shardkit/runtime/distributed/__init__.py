"""The group of ranks: its collectives, how ranks find each other, and what failed when one does."""
