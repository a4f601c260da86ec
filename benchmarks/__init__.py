"""Comparisons with other systems; they are of the repository, and no wheel holds them."""

if __name__ != "moesys.benchmarks":
    # From the repository root a bare `import benchmarks` also succeeds and yields a second copy of every class.
    raise ImportError("import moesys.benchmarks, not benchmarks: this folder is part of the moesys package")
