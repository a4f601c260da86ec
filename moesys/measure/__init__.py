"""Measuring what MoE layers and their communication cost."""
