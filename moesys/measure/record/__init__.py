"""Recording of a training step: what each rank sent, when it waited, and the files that keep it."""
