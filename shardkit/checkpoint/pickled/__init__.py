"""Pickled weights, if they are allowed: checked, converted in a sandbox, then read as any other."""

from shardkit.checkpoint.pickled.convert import open_source

__all__ = ["open_source"]
