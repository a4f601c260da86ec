"""Dispatchers of expert parallelism: they send tokens to the ranks of their experts and bring results back."""
