"""Secrets in `launch.env`: told by their names, never written, taken from the launching shell instead.

    launch: {env: {WANDB_API_KEY: $WANDB_API_KEY, NCCL_DEBUG: WARN}}

A value that is `$NAME` (or `${NAME}`) as a whole stands for the variable of the process that launches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from moesys.config.schema import Config
from moesys.errors import ConfigError, Problem

ANYWHERE = re.compile("SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|APIKEY|BEARER")
"""Parts that make a name that of a secret, wherever they stand in it."""

WORDS = {"KEY", "KEYS", "TOKEN", "TOKENS", "AUTH", "AUTHORIZATION", "OAUTH", "PASS", "PWD", "PAT", "NETRC", "SALT"}
"""The same as one of its words, which `_`, `-` and `.` part."""

ABOUT = {"MODE", "TYPE", "METHOD", "SOCK", "ENABLED", "PARALLELISM", "BITS"}
"""Last words of names that are about a secret and are none."""

ORDINARY = {"PWD", "OLDPWD"}

IN_ADDRESS = re.compile(r"\w://[^/\s@]+@")
"""A user, with a password perhaps, in an address."""

REFERENCE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable holds a secret: by its name, or because its value is an address with a password in it."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    named = bool(ANYWHERE.search(name.upper())) or (bool(WORDS & set(words)) and words[-1] not in ABOUT)
    return (named and name not in ORDINARY) or bool(IN_ADDRESS.search(value))


def hidden(config: Config) -> Config:
    """`config` with every secret in `launch.env` replaced by `$NAME`, fit to be written anywhere."""
    env = config.launch.env
    secret = {name: f"${name}" for name, value in env.items() if is_secret(name, value) and not reference(value)}
    if not secret:
        return config
    launch = config.launch.model_copy(update={"env": env | secret})
    return config.model_copy(update={"launch": launch})


def reference(value: str) -> str | None:
    """The variable that a value stands for, None if it stands for itself."""
    found = REFERENCE.fullmatch(value)
    return (found[1] or found[2]) if found else None


def resolved(env: Mapping[str, str], caller: Mapping[str, str]) -> dict[str, str]:
    """`launch.env` with references to the caller's variables replaced by their values.

    Raises:
        ConfigError: the caller lacks some of them; all are named.
    """
    wanted = {name: reference(value) for name, value in env.items()}
    problems = [
        Problem(
            f"launch.env.{name}",
            f"the variable {variable} is not set here",
            f"export {variable} before the launch, or leave the key out",
            given=env[name],
        )
        for name, variable in wanted.items()
        if variable is not None and variable not in caller
    ]
    if problems:
        raise ConfigError(problems)
    return {name: caller[variable] if (variable := wanted[name]) else value for name, value in env.items()}
