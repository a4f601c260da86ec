"""A stand-in for NVIDIA apex, which needs a GPU and a compiler: its FusedAdam's interface and rules, on any device."""
