"""Predictions: the links of a cluster, and what another setting would have cost."""
