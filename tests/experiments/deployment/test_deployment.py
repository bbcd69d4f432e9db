"""Compressed networks in engines: benchmark and tradeoff, from end to end."""

import gc
import itertools
import json
import signal
import sys

import numpy as np
import pytest

from cram_jax import engine
from cram_jax.export import onnx_inputs, to_onnx
from experiments.__main__ import main
from experiments.deployment import tradeoff
from experiments.deployment.benchmark import Outcome, Row
from experiments.deployment.engines import ENGINES
from experiments.deployment.peers import load_openvino
from experiments.deployment.tables import console_table
from experiments.deployment.timing import Spread
from experiments.deployment.tradeoff import drawn_targets, pareto, plot_tradeoff
from experiments.images.data import load
from experiments.images.deployment import image_network, samples
from experiments.kinds import kind_of
from experiments.recipes import digits
from experiments.runs.metrics import make_console

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def _no_measured_tiles(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def no_peers(monkeypatch):
    """As if neither ONNX Runtime nor OpenVINO were installed."""

    for name in ("onnx", "onnxruntime", "onnxruntime.quantization", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)


def test_int8_is_as_accurate_as_float32_on_the_whole_test_set(recorded_model, data_dir):
    data = load(digits.blocks.data, data_dir)
    network = image_network(
        digits.blocks.model, data.shape, data.classes, *recorded_model
    )
    images = samples(digits.blocks, data)
    exact = images.score(lambda inputs: np.asarray(network.forward(*inputs)))
    assert exact == 98.0  # as recorded
    examples = engine.Calibration(images.calibration(1000))
    fast = engine.compile(network.graph, calibration=examples)
    int8 = images.score(lambda inputs: fast(*inputs))
    assert int8 == pytest.approx(exact, abs=0.3)


def test_benchmark_stands_dense_int8_beside_ours(run, tmp_path, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "benchmark.json"
    command = f"benchmark {run} --engines cram jit --target b90 --rounds 1 --out {out}"
    assert main([*command.split(), "--batch", "1", "3", "--threads", "1", "2"]) == 0
    assert "cram" in capsys.readouterr().out
    (network,) = json.loads(out.read_text())["networks"]
    rows = {(row["engine"], row["target"]): row for row in network["rows"]}
    assert ("onnxruntime-int8", "dense") in rows
    # BERTs only.
    assert ("onnxruntime-dynamic", "dense") not in rows
    jit, ours = rows["jit", "dense"], rows["cram", "b90"]
    assert (jit["largest_difference"], jit["accuracy"]) == (0, 98.0)
    assert 0 < ours["largest_difference"] < 0.05
    # One byte a weight, one of ten blocks, and a stem, a head and scales that stay.
    assert ours["bytes"] < jit["bytes"] / 8
    settings = {(t["batch"], t["threads"]) for t in ours["times"]}
    assert settings == {(1, 1), (1, 2), (3, 1), (3, 2)}
    for time in ours["times"]:
        cpu = time["cpu_ms"]
        assert 0 < cpu["least"] <= cpu["median"] <= cpu["most"]
    assert "| cram | b90 |" in out.with_suffix(".md").read_text()


def test_a_table_in_a_file_has_the_names_of_all_engines(capsys):
    ms = Spread(1234.567, 1123.456, 1345.678)
    times = {(16, 2): (ms, ms)}
    rows = [Row(name, "dense", 10**8, 0.1, 99.0, times) for name in ENGINES]
    outcome = Outcome("bert_base", "accuracy", {"dense": 99.0}, rows)
    make_console().print(console_table(outcome, 16, 2))
    text = capsys.readouterr().out
    assert [name for name in ENGINES if f" {name} " not in text] == []
    assert text.count("1234.567") == 2 * len(ENGINES)


def test_tradeoff_draws_every_target(run, no_peers, capsys):
    assert main(f"tradeoff {run} --target dense b95 --rounds 1".split()) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("left out: ")]
    assert "ONNX Runtime INT8, OpenVINO INT8" in " ".join(lines)
    assert "needs onnx: pip install" in lines[0]
    for ending in ("png", "json", "md"):
        assert (run / f"tradeoff.{ending}").stat().st_size > 0
    (network,) = json.loads((run / "tradeoff.json").read_text())["networks"]
    found = [(row["engine"], row["target"]) for row in network["rows"]]
    assert found == [("cram", "dense"), ("cram", "b95"), ("jit", "dense")]


def test_names_in_the_picture_lie_beside_each_other(tmp_path, monkeypatch):
    """Of networks that are almost as large, fast and accurate, too."""
    measured = {
        "dense": (1.257, 0.166, 85.61),
        "b50": (0.657, 0.125, 84.43),
        "k80": (0.678, 0.159, 84.45),
        "k70": (0.680, 0.126, 84.40),
        "b90": (0.168, 0.042, 80.15),
    }
    rows = []
    for target, (megabytes, ms, accuracy) in measured.items():
        spread = Spread(ms, ms, ms)
        times = {(1, 1): (spread, spread)}
        rows.append(Row("cram", target, int(1e6 * megabytes), 0.0, accuracy, times))
    figures = []
    monkeypatch.setattr(
        tradeoff, "save_picture", lambda figure, _: figures.append(figure)
    )
    outcome = Outcome("network", "accuracy", {"dense": 85.61}, rows)
    plot_tradeoff(outcome, (1, 1), tmp_path / "picture.png", "title")
    (figure,) = figures
    for axes in figure.axes:
        assert {text.get_text() for text in axes.texts} == {*measured}
        boxes = [text.get_window_extent() for text in axes.texts]
        pairs = itertools.combinations(boxes, 2)
        assert not any(one.overlaps(other) for one, other in pairs)


@pytest.mark.nightly
def test_random_networks_need_no_run(no_peers, capsys):
    command = "benchmark resnet20 --engines cram-float32 --target b90 --rounds 1"
    assert main(command.split()) == 0
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("benchmark nowhere", "nowhere is neither the directory of a run nor one of"),
        ("benchmark resnet20 --target x90", "target 'x90' is unknown"),
        ("benchmark resnet20 --rounds 0", "rounds must be at least 1, got 0"),
        ("benchmark resnet20 --batch 0", "batch must be at least 1, got 0"),
        ("benchmark resnet20 --out a.txt", "out must be a file ending in .json"),
        ("tradeoff nowhere", "nowhere is not a run"),
    ],
)
def test_what_is_wrong_is_one_line(command, message, capsys):
    assert main(command.split()) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_texts_are_judged_as_their_task_judges(text_config, text_data, text_task):
    params, statistics = text_task.init(0)
    kind = kind_of(text_config)
    network = kind.deploy(text_config, text_data, params, statistics)
    rows = kind.samples(text_config, text_data)
    expected = text_task.evaluate(params, statistics, text_data.evaluation)
    fast = engine.compile(network.graph)
    assert rows.metric == "f1"
    assert rows.score(lambda inputs: fast(*inputs)) == pytest.approx(expected["f1"])
    inputs = rows.inputs(3)
    exact = np.asarray(network.forward(*inputs))
    np.testing.assert_allclose(fast(*inputs), exact, atol=1e-5 * np.abs(exact).max())


def test_networks_that_were_in_openvino_leave_signals_alone(tmp_path):
    """Each gave its thread a stack for signals, and the one before it when it went."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    network = engine.GraphBuilder()
    x = network.add(engine.Input((4,)))
    graph = network.build(network.add(engine.Linear(np.eye(4)), x))
    path = tmp_path / "network.onnx"
    to_onnx(graph, path)
    ones = np.ones((2, 4), np.float32)
    networks = [load_openvino(path, threads) for threads in (1, 2)]
    while networks:
        np.testing.assert_array_equal(networks.pop(0)(onnx_inputs(graph, [ones])), ones)
        gc.collect()
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_the_front_is_what_no_other_point_beats():
    costs, gains = [3, 1, 2, 2, 4], [90, 50, 40, 70, 90]
    assert pareto(costs, gains) == [1, 3, 0]


def test_targets_that_save_no_time_are_not_drawn():
    rounded = ("4bit", "b90+4bit", "nested8", "k90+mxfp4", "nvfp4", "g90@4bit")
    names = ("dense", "k90", "2:4", "b90", *rounded)
    assert drawn_targets(names) == ("dense", "k90", "b90")
