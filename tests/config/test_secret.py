"""Secrets of `launch.env`: which they are, and that nothing writes them."""

from __future__ import annotations

import pytest

from moesys.config.load import dump, load
from moesys.config.schema import Config
from moesys.config.secret import hidden, is_secret, resolved
from moesys.errors import ConfigError
from moesys.launchers.spec import RunSpec, late_variables

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD",
    "MY_PASSWD", "GOOGLE_APPLICATION_CREDENTIALS", "OPENAI_APIKEY", "GITHUB_PAT", "MYSQL_PWD", "HTTP_AUTH",
    "db.password", "RAY_AUTH_TOKEN", "SSH_PASSPHRASE", "lower_case_token",
)  # fmt: skip
ORDINARY = (
    "TOKENIZERS_PARALLELISM", "RAY_AUTH_MODE", "SSH_AUTH_SOCK", "PWD", "OLDPWD", "PATH", "PYTHONPATH", "NCCL_IB_PKEY",
    "NCCL_DEBUG", "OMP_NUM_THREADS", "WANDB_PROJECT", "MONKEY", "XDG_CACHE_HOME", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)  # fmt: skip


def config(**env: str) -> Config:
    return Config.model_validate({"model": {"hidden": 8, "layers": 1}, "launch": {"env": env}})


def test_secrets_are_told_by_their_names_and_addresses_with_passwords() -> None:
    assert [name for name in SECRETS if not is_secret(name)] == []
    assert [name for name in ORDINARY if is_secret(name)] == []
    assert is_secret("HTTPS_PROXY", "http://me:hunter2@proxy:3128")
    assert not is_secret("HTTPS_PROXY", "http://proxy:3128/a@b")


def test_nothing_that_is_written_holds_a_secret(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter3")
    given = config(HF_TOKEN="hunter2", WANDB_API_KEY="$WANDB_API_KEY", PLAIN="shown", ALIAS_KEY="${WANDB_API_KEY}")
    spec = RunSpec.of(given, tmp_path)
    assert {name: spec.env[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "PLAIN", "ALIAS_KEY")} == {
        "HF_TOKEN": "hunter2", "WANDB_API_KEY": "hunter3", "PLAIN": "shown", "ALIAS_KEY": "hunter3",
    }  # fmt: skip
    for text in (repr(spec), str(spec.config.model_dump()), dump(given), dump(spec.config)):
        assert "PLAIN" in text and "hunter" not in text
    late = late_variables(spec.env)
    assert {"HF_TOKEN", "WANDB_API_KEY", "ALIAS_KEY"} <= late.keys() and "PLAIN" not in late


def test_what_was_written_is_read_with_the_secret_of_the_shell(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(hidden(config(HF_TOKEN="hunter2"))))
    read = load(path).config.launch.env
    assert read == {"HF_TOKEN": "$HF_TOKEN"}
    assert resolved(read, {"HF_TOKEN": "of the shell"}) == {"HF_TOKEN": "of the shell"}


def test_variables_that_the_shell_lacks_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        resolved({"A_KEY": "$A_KEY", "B": "${OTHER}", "C": "$5 a day"}, {})
    assert str(error.value).startswith(
        "2 problems in the configuration\n  launch.env.A_KEY is $A_KEY: the variable A_KEY"
    )
    assert "remedy: export OTHER before the launch, or leave the key out" in str(error.value)


def test_slurm_hands_secrets_to_sbatch_and_writes_them_nowhere(tmp_path, monkeypatch) -> None:
    from moesys.launchers import slurm

    (tmp_path / "sbatch").write_text('#!/bin/sh\nenv > "$0.env"; cat "$1" > "$0.script"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slurm.submit(RunSpec.of(config(HF_TOKEN="hunter2", PLAIN="shown"), tmp_path / "run")) == 0
    script = (tmp_path / "sbatch.script").read_text()
    assert "export PLAIN=shown" in script and "hunter2" not in script
    assert "HF_TOKEN=hunter2\n" in (tmp_path / "sbatch.env").read_text()
