"""Files to start from: written once, legal in any folder, and found by name."""

import pytest

from moesys import cli, shipped
from moesys.config import starter
from moesys.train.validate import load_checked


@pytest.mark.parametrize("name", list(starter.starters()))
def test_every_starter_is_legal_in_a_folder_without_configurations(name, tmp_path):
    path = tmp_path / "mine.yaml"
    starter.write(name, path)
    text = path.read_text()
    assert "moesys launch mine.yaml" in text and "configs/" not in text, "commands name the file that was written"
    config = load_checked(path, with_data=False)
    assert config.name == "mine"
    if shipped.names()[name].parent.name == "models":
        of_the_model = tmp_path / "shape.yaml"
        of_the_model.write_text(f"include: {name}\n")
        assert load_checked(of_the_model, with_data=False).model == config.model


def test_a_starter_explains_the_keys_that_a_beginner_changes():
    for name in ("quickstart", "mixtral-8x7b", "deepseek-v3"):
        lines = starter.starter(name, "x.yaml").splitlines()
        for key in ("global_batch:", "micro_batch:"):
            assert any(line.lstrip().startswith(key) and "# sequences" in line for line in lines), (name, key)


def test_init_lists_writes_and_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 0
    listed = capsys.readouterr().out
    assert listed.index("quickstart\n") < listed.index("mixtral-8x7b\n")
    assert "    Mixtral-8x7B-v0.1 (Mistral AI 2024, arXiv 2401.04088): 46.7B parameters, 12.9B active.\n" in listed
    assert cli.main(["init", "mixtral-8x7b"]) == 0
    assert "moesys launch mixtral-8x7b.yaml" in capsys.readouterr().out
    written = (tmp_path / "mixtral-8x7b.yaml").read_text()
    (tmp_path / "mixtral-8x7b.yaml").write_text(written + "# mine\n")
    assert cli.main(["init", "mixtral-8x7b"]) == 2
    assert "mixtral-8x7b.yaml: exists, and is left as it is\n    remedy: name another" in capsys.readouterr().err
    assert (tmp_path / "mixtral-8x7b.yaml").read_text() == written + "# mine\n"
    assert cli.main(["init", "mixtrl-8x7b", "--to", "x.yaml"]) == 2
    assert "remedy: did you mean mixtral-8x7b?" in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()
    with pytest.raises(SystemExit):
        cli.main(["init", "quickstart", "--to", "no/folder.yaml"])
    assert "no folder" in capsys.readouterr().err
