"""Kinds of gates, described: one file each, named for the word of the YAML.

kind          the base of all kinds, and keys that several share
rules         rules between the keys of gates, their losses and capacity

The arithmetic of each stands in the file of the same name in `moesys.moe.gates`, which needs torch alone.
"""
