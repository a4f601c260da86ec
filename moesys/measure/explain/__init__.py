"""The explanation of recorded steps: why ranks waited, where a step went, and one sentence that says so."""
