"""Descriptions of the dispatchers, one file each: when one is legal, what it costs, and how it is built.

None of them needs torch. `moesys.parallel.dispatchers.kind` is their base, `moesys.config.registry` finds them.
"""
