"""`moesys bench layer`: one MoE layer beside its arithmetic and beside other systems."""
