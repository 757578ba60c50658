"""Recipes are drafted from a model, checked by running it, and their proofs are recorded."""
