"""Rows that join and leave a running batch: caches, steps and token selection, on each rank."""
