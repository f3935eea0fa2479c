"""tdpo/cli/run_config.py: a stranger's config.yaml neither reads the environment nor ends in a traceback."""

import os

import pytest
from helpers import MINI, compose, run
from omegaconf import OmegaConf

import eval as evaluation
import plot
import sample
import token_report
from tdpo.cli.run_config import load_run_config
from tdpo.utils import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run("loss=sft", "n_examples=8", "batch_size=8", "n_eval_examples=8", f"local_run_dir={tmp_path_factory.mktemp('runs')}/run")


def test_references_stay_text(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    config = compose("exp_name=x", f"model.name_or_path={MINI}/model")
    config.model.name_or_path = "a"
    OmegaConf.save(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    forms = {"${oc.env:TOKEN}": "${oc.env:TOKEN}", r"\${oc.env:TOKEN}": "${oc.env:TOKEN}", "${exp_name}": "${exp_name}"}
    for given, expected in forms.items():
        (tmp_path / "config.yaml").write_text(text.replace("name_or_path: a\n", f"name_or_path: '{given}'\n"))
        found = load_run_config(str(tmp_path / "config.yaml"))
        assert found.model.name_or_path == expected and "secret" not in OmegaConf.to_yaml(found, resolve=True)


DAMAGES = {
    "empty": b"",
    "no UTF-8": b"\xff\xfe",
    "no YAML": b"a: [",
    "list": b"- a\n",
    "text": b"hello",
    "tag": b"a: !!python/object/apply:os.system ['true']\n",
    "duplicate": b"a: 1\na: 2\n",
    "aliases": b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "reference": b"model: ${model}\n",
    "deep": b"[" * 3000,
    "zeros": bytes(100),
    "large": b"a: 1\n" + b"#" * 2**20,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_config_is_named(damage, tmp_path):
    (tmp_path / "config.yaml").write_bytes(DAMAGES[damage])
    with pytest.raises(UserError, match=f"'{tmp_path}/config.yaml' is not the config of a run") as error:
        load_run_config(str(tmp_path / "config.yaml"))
    assert len(str(error.value).splitlines()) == 1


def test_no_command_reads_the_environment_for_a_stranger(finished, tmp_path, monkeypatch, capsys):
    """A path, a list and a name."""
    monkeypatch.setenv("TOKEN", "the-secret-of-this-machine")
    config = OmegaConf.load(finished / "config.yaml")
    whole = (finished / "config.yaml").read_text()
    try:
        for key in ("model.tokenizer_name_or_path", "local_dirs", "loss.name"):
            changed = OmegaConf.create(OmegaConf.to_container(config))
            OmegaConf.update(changed, key, ["${oc.env:TOKEN}"] if key == "local_dirs" else "${oc.env:TOKEN}")
            (finished / "config.yaml").write_text(OmegaConf.to_yaml(changed))
            here = [f"run={finished}", f"out={tmp_path}/out"]
            for main, name in ((sample, "sample"), (evaluation, "eval"), (token_report, "token_report")):
                try:
                    main.run(compose(*here, *(["n_prompts=1"] if name != "token_report" else []), name=name))
                except (UserError, KeyError) as error:
                    assert os.environ["TOKEN"] not in str(error) and not isinstance(error, KeyError), key
            try:
                plot.findings_of(str(finished), [])
            except UserError as error:
                assert os.environ["TOKEN"] not in str(error)
            assert os.environ["TOKEN"] not in "".join(capsys.readouterr())
    finally:
        (finished / "config.yaml").write_text(whole)
