"""The YAML of a run: its schema and how it is read."""

from moesys.config.schema import Config as Config
