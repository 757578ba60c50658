"""A program that uses the public API only, as a user would write it."""
