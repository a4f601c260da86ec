"""Plain single-device models, and their sizes without building them (`size` needs no torch)."""
