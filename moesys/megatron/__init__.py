"""The plug-in for Megatron-Core, and the engine on it; nothing else in the package imports Megatron-Core."""
