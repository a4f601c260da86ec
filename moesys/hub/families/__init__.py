"""Families of released models, one per file."""
