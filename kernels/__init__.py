if __name__ != "moesys.kernels":
    # From the repository root a bare `import kernels` also succeeds and yields a second copy of every class.
    raise ImportError("import moesys.kernels, not kernels: this folder is part of the moesys package")

# One file per operation: a plain torch reference and what is fast beside it.
