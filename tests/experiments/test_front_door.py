"""What people expect of a program: versions, files, hints, loggers."""

import contextlib
import dataclasses
import io
import json
import sys
import types

import pytest
from flax import nnx
from rich.console import Console

import cram_jax
from experiments.__main__ import main
from experiments.errors import ConfigError, RunError
from experiments.images.config import ImageConfig, ModelConfig
from experiments.images.models import make_model
from experiments.images.task import classification
from experiments.recipes import RECIPES
from experiments.runs.claim import claim
from experiments.runs.directory import (
    evaluate_command,
    load_config,
    resume_command,
    save_config,
    write_status,
)
from experiments.runs.loggers import LOGGERS, check_loggers
from experiments.runs.metrics import Report, progress_bar
from experiments.runs.stored_config import to_dict
from experiments.verbs.train import parse_train


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cram-jax {cram_jax.__version__}\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "recipe: digits\nepochs: 3\noptimizer: {rho: 0.2}\n"),
        ("run.json", '{"recipe": "digits", "epochs": 3, "optimizer": {"rho": 0.2}}'),
    ],
)
def test_a_file_changes_the_recipe_that_it_names(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    train = parse_train(["--config", str(tmp_path / name), "--seed", "4"])
    base = RECIPES["digits"]
    optimizer = dataclasses.replace(base.optimizer, rho=0.2)
    expected = dataclasses.replace(base, epochs=3, seed=4, optimizer=optimizer)
    assert train.configuration() == expected


@pytest.mark.parametrize("name", ["digits_sr_ste", "own_texts"])
@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_the_configuration_of_a_run_is_read_back(name, ending, tmp_path):
    """Those of texts hold 1e-12, no number in YAML 1.1, and labels of any kind."""
    config = RECIPES[name]
    if name == "own_texts":
        data = dataclasses.replace(config.data, labels=("\N{GRINNING FACE}", "no"))
        config = dataclasses.replace(config, data=data)
    file = tmp_path / f"config.{ending}"
    stored = to_dict(config)
    file.write_text(json.dumps(stored, ensure_ascii=ending == "json"))
    assert parse_train(["--config", str(file)]).configuration() == config


def test_numbers_in_a_file_are_those_of_yaml_1_2(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "recipe: digits\neval_targets: [dense, 2:4]\nepochs: 1_0\nseed: 07\n"
        "optimizer: {learning_rate: 1e-1, weight_decay: 5E-4, rho: .5, momentum: 0.}\n"
        "name: 1e2x\n"
    )
    config = parse_train(["--config", str(file)]).configuration()
    assert config.eval_targets == ("dense", "2:4")
    assert (config.epochs, config.seed, config.name) == (10, 7, "1e2x")
    rule = config.optimizer
    assert (rule.learning_rate, rule.weight_decay) == (0.1, 5e-4)
    assert (rule.rho, rule.momentum) == (0.5, 0.0)


def test_a_file_that_holds_no_configuration_is_one_message(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    for text, message in (
        ("epochs: many", "epochs must be"),
        ("epoch: 3", "did you mean 'epochs'?"),
        ("- 3", "it must hold fields, got list"),
        ("a: [", "cannot read"),
    ):
        file.write_text(text)
        assert main(["train", "--config", str(file)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "rule"),
    [("constant", "cram_plus"), ("cosine", "cram_plus"), ("constant", "gradual")],
)
def test_epochs_are_added_if_the_schedule_allows(schedule, rule, config, tmp_path):
    optimizer = dataclasses.replace(
        config.optimizer,
        schedule=schedule,
        warmup=0.0,
        rule=rule,
        train_targets=("k50",),
    )
    config = dataclasses.replace(config, optimizer=optimizer)
    longer = dataclasses.replace(config, epochs=config.epochs + 3)
    run = tmp_path / "run"
    save_config(run, config)
    allowed = (schedule, rule) == ("constant", "cram_plus")
    outcome = (
        contextlib.nullcontext()
        if allowed
        else pytest.raises(RunError, match=r"scheduled for 2 epochs .*--init-from")
    )
    out = io.StringIO()
    report = Report(progress_bar(Console(file=out)))
    with outcome, contextlib.ExitStack() as stack:
        claim(stack, run, longer, report, resume=True, overwrite=False)
    assert load_config(run).epochs == (longer if allowed else config).epochs
    assert ("5 epochs instead of 2" in out.getvalue()) == allowed


def test_a_run_that_stopped_early_takes_more_epochs_only_with_patience(
    config, tmp_path
):
    optimizer = dataclasses.replace(config.optimizer, schedule="constant", warmup=0.0)
    config = dataclasses.replace(config, optimizer=optimizer, patience=2)
    save_config(tmp_path, config)
    write_status(tmp_path, state="finished", step=8, steps=10)
    out = io.StringIO()
    report = Report(progress_bar(Console(file=out)))

    def resumed(**changes):
        changed = dataclasses.replace(load_config(tmp_path), **changes)
        with contextlib.ExitStack() as stack:
            claim(stack, tmp_path, changed, report, resume=True, overwrite=False)

    match = r"at step 8 of 10, by patience=2: epochs=9 .* larger --patience"
    with pytest.raises(RunError, match=match):
        resumed(epochs=9)
    for patience in (0, 1):  # the best model would be another
        with pytest.raises(RunError, match="started with a different patience"):
            resumed(patience=patience)
    assert load_config(tmp_path) == config
    resumed(epochs=9, patience=3)
    assert load_config(tmp_path) == dataclasses.replace(config, epochs=9, patience=3)
    said = " ".join(out.getvalue().split())
    assert "9 epochs instead of 2" in said
    assert "patience 3 instead of 2" in said


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_are_lines_only_without_a_bar(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None)
    report = Report(progress_bar(console))
    report.say("evaluated: accuracy 98.00 %")
    report.say_off_terminal("step 3/20")
    lines = ["evaluated: accuracy 98.00 %", *([] if terminal else ["step 3/20"])]
    assert out.getvalue().splitlines() == lines


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"logger {name} needs its package: pip"):
        check_loggers((name,))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_gets_the_configuration_and_every_metric(
    name, config, tmp_path, monkeypatch
):
    calls = []

    def record(function):
        def call(*values, **named):
            calls.append((function, values, named))
            return service

        return call

    names = {
        "wandb": ["init", "log", "finish"],
        "mlflow": ["start_run", "log_dict", "log_metrics", "end_run"],
    }[name]
    service = types.SimpleNamespace(**{each: record(each) for each in names})
    monkeypatch.setitem(sys.modules, name, service)
    logger = LOGGERS[name](tmp_path / "run7", config, 0)
    logger.write(3, {"loss": 0.5})
    logger.close()
    assert [function for function, *_ in calls] == names
    assert "run7" in repr(calls[0])
    assert "'epochs': 2" in repr(calls)
    assert calls[-2][1:] == (({"loss": 0.5},), {"step": 3})


NETWORK = """
from flax import nnx

class Own(nnx.Module):
    def __init__(self, channels, classes, rngs):
        self.head = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, images, training):
        return self.head(images.mean((1, 2)))
"""


def test_a_network_of_your_own_is_made_by_its_factory(tmp_path, monkeypatch):
    (tmp_path / "my_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    config = ModelConfig(module="my_network:Own")
    network = make_model(config, 3, 5, rngs=nnx.Rngs(0))
    assert network.head.kernel.shape == (3, 5)


OTHER = NETWORK.replace("images, training", "images")
WIDE = NETWORK.replace(
    "channels, classes, rngs=rngs", "channels, classes + 1, rngs=rngs"
)
RANDOM = NETWORK.replace(
    "self.head =", "self.drop = nnx.Dropout(0.1, rngs=rngs); self.head ="
)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (OTHER, r"is called as model\(images, training=False\), here with .*: "),
        (WIDE, r"must make a network that returns logits of shape \(batch, 4\), got"),
        (RANDOM, r"parameters and batch statistics, got Rng\w+ at drop/.* dropout is"),
    ],
)
def test_a_network_that_is_called_otherwise_is_refused(
    network, message, data, tmp_path, monkeypatch
):
    (tmp_path / "other_network.py").write_text(network)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_network", raising=False)
    config = ImageConfig(model=ModelConfig(module="other_network:Own"))
    with pytest.raises(ConfigError, match=message):
        classification(config, data)


def test_printed_commands_name_the_code_of_a_users_own_network(tmp_path):
    run = tmp_path / "run"
    assert resume_command(run).endswith(f"--resume {run}")
    save_config(run, ImageConfig(model=ModelConfig(module="my_network:Own")))
    assert resume_command(run).endswith(" --model.module my_network:Own")
    assert evaluate_command(run).endswith(f" {run} --module my_network:Own")


def test_code_that_only_a_run_names_does_not_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_network.py").write_text("raise SystemError('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    save_config(
        tmp_path / "run", ImageConfig(model=ModelConfig(module="my_network:Own"))
    )
    for verb in ("evaluate", "audit", "compress --target k90", "compare --init-from"):
        assert main([*verb.split(), str(tmp_path / "run")]) == 1
        assert "runs only if you name it" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run")]) == 1
    assert "--model.module my_network:Own" in capsys.readouterr().err
