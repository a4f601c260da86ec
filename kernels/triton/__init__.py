# Kernels in Triton, one file per operation. Importing one of them imports Triton, which is optional: only the
# branches that `moesys.kernels.choose` sends there do so.
