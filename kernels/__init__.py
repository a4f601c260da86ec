if __name__ != "moesys.kernels":
    # From the repository root a bare `import kernels` also succeeds and yields a second copy of every class. It gives
    # an empty module, and no error: transformers imports a package of this name, if there is one, for its version.
    __path__ = []

    def __getattr__(name: str) -> None:
        """Every name of another package, refused; special names are missing, as in an empty module."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("import moesys.kernels, not kernels: this folder is part of the moesys package")

# One file per operation: a plain torch reference and what is fast beside it.
