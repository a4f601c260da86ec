# What exists only because it is fast on CPUs; torch and Triton do this themselves on GPUs.
