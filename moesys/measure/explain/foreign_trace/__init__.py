"""Traces of torch's profiler from any framework's run, read as recorded steps."""
