"""Model classes by name: transformers' own, and those built in here."""
