"""The check of a machine's GPU: what runs on it, and how fast, as one JSON file and one table.

Needs torch alone; Triton, transformers and pytest add to what is checked.
"""
