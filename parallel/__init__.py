if __name__ != "moesys.parallel":
    # From the repository root a bare `import parallel` also succeeds and yields a second copy of every class.
    raise ImportError("import moesys.parallel, not parallel: this folder is part of the moesys package")
