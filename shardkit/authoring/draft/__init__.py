"""Drafts: a first recipe for a model type that has none, from what a small model of it computes."""
