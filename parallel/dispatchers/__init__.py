"""Dispatchers of expert parallelism: how tokens travel to experts and results back."""
