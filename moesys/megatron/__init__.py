"""What concerns Megatron-Core; nothing else in the package imports it."""
