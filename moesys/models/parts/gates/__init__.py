"""Kinds of gates: one file each."""
