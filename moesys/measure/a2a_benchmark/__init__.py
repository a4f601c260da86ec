"""`moesys bench a2a`: a benchmark of collectives and dispatchers in the manner of nccl-tests."""
