"""Kinds of mixers: one file each."""
