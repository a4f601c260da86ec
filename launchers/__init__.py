if __name__ != "moesys.launchers":
    # From the repository root a bare `import launchers` also succeeds and yields a second copy of every class.
    raise ImportError("import moesys.launchers, not launchers: this folder is part of the moesys package")
