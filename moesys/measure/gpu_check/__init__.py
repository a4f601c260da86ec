"""The check of a machine's GPU: the features that run on it, and their speed, as one JSON file and one table.

It needs torch alone. It also checks Triton, transformers and pytest if they are installed.
"""
