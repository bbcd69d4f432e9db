"""The language half of the command line, from end to end, on facts of our own."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds

from experiments.__main__ import main
from experiments.commands import evaluate as evaluation_command
from experiments.evaluation.evaluation import evaluate_target
from experiments.evaluation.results import load_results
from experiments.runs import checkpoints
from experiments.runs.directory import load_config, save_config
from experiments.runs.stored_config import from_dict
from experiments.text.huggingface import load_bert, save_bert
from experiments.text.question_answering import make_network
from experiments.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = (
    "--model.num-hidden-layers 1 --model.hidden-size 16 --model.num-attention-heads 2 "
    "--model.intermediate-size 32 --model.vocab-size 128 --data.max-length 48 "
    "--data.stride 8 --data.question-limit 12 --data.batch-size 8 --data.examples 12 "
    "--data.evaluation-examples 5 --optimizer.learning-rate 0.01"
)
SECOND_ORDER = (
    "--second-order.gradients 8 --second-order.block-size 4 "
    "--second-order.recomputations 1"
)


@pytest.fixture(scope="module")
def places(facts, make_vocabulary, text_config):
    """Flags that say where questions and vocabulary are."""
    return (
        f"--train-file {facts} --eval-file {facts} "
        f"--vocabulary {text_config.vocabulary}"
    )


@pytest.fixture(scope="module")
def weights(text_config, tmp_path_factory):
    """A directory as Hugging Face stores a BERT, with its vocabulary."""
    folder = tmp_path_factory.mktemp("weights")
    model = dataclasses.replace(
        text_config.model,
        hidden_size=16,
        intermediate_size=32,
        max_position_embeddings=512,
        initializer_range=0.02,
    )
    net = make_network(dataclasses.replace(text_config, model=model))
    params, _ = net.init(7)
    save_bert(folder, net.module(params))
    shutil.copy(f"{text_config.vocabulary}/vocab.txt", folder)
    return folder


@pytest.fixture(scope="module")
def run(places, weights, tmp_path_factory):
    """A run of one epoch from the weights."""
    run = tmp_path_factory.mktemp("runs") / "run"
    command = f"train squad_small --run {run} --weights {weights} --epochs 1 {SIZES}"
    assert main([*command.split(), *places.split()]) == 0
    return run


def test_training_starts_from_the_weights_and_leaves_embeddings_alone(
    run, weights, facts
):
    params, batch_stats = checkpoints.read_model(run)
    model = load_bert(weights, "question_answering").model
    table = np.asarray(model.bert.embeddings.word.embedding[...])
    np.testing.assert_array_equal(
        params["bert"]["embeddings"]["word"]["embedding"], table
    )
    kernel = np.asarray(model.bert.layer0.output.kernel[...])
    assert not np.array_equal(params["bert"]["layer0"]["output"]["kernel"], kernel)
    assert not jax.tree.leaves(batch_stats)
    config = load_config(run)
    assert (config.weights, config.train_file) == (str(weights), str(facts))


def test_evaluation_is_a_table_of_f1_without_recalibration(run, capsys, tmp_path):
    command = f"evaluate {run} --targets dense u50 o50 2:4 {SECOND_ORDER}"
    assert main(command.split()) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "f1 (%)" in text
    assert "recalib" not in text
    assert "calibrations" not in text
    assert "50 % second order" in text
    results = load_results(run / "evaluation.json")
    assert results["metric"] == "f1"
    (entry,) = results["methods"]["cram_plus"]["runs"]
    assert list(entry["pruned"]) == ["dense", "u50", "o50", "2:4"]
    assert entry["recalibrated"] == entry["draws"] == {}
    assert entry["metrics"]["u50"]["f1"] == entry["pruned"]["u50"]
    assert set(entry["metrics"]["u50"]) == {"f1", "exact_match", "loss"}
    assert from_dict(entry["config"]) == load_config(run)
    assert list(entry["settings"]) == ["o50"]
    assert entry["settings"]["o50"]["second_order.gradients"] == 8

    assert main(["report", str(run), "--out", str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "# squad-bert-1x16" in report
    assert "| f1 (%) | CrAM+-Multi, pruned |" in report


def test_figures_on_other_questions_are_not_mixed(
    run, facts, tmp_path, monkeypatch, capsys
):
    """Neither with those that are stored, nor with those of a stopped evaluation."""
    copy, asked = tmp_path / "run", tmp_path / "asked.json"
    shutil.copytree(run, copy)
    shutil.copy(facts, asked)
    save_config(copy, dataclasses.replace(load_config(copy), eval_file=str(asked)))
    (copy / "evaluation.json").unlink(missing_ok=True)
    command = f"evaluate {copy} --targets".split()
    assert main([*command, "dense"]) == 0

    def stopped(*arguments, **options):
        if arguments[-1] == "k50":
            raise KeyboardInterrupt
        return evaluate_target(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_command, "evaluate_target", stopped)
        assert main([*command, "u50", "k50"]) == 130
    corrected = json.loads(asked.read_text())
    for article in corrected["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                question["question"] = "Well? " + question["question"]
    asked.write_text(json.dumps(corrected))
    seen = []

    def counted(*arguments, **options):
        seen.append(arguments[-1])
        return evaluate_target(*arguments, **options)

    monkeypatch.setattr(evaluation_command, "evaluate_target", counted)
    assert main([*command, "u50", "k50"]) == 0
    assert seen == ["u50", "k50"]
    assert "of another model or other examples" in capsys.readouterr().out
    assert load_results(copy / "evaluation.json")["targets"] == ["u50", "k50"]


def test_a_compressed_model_trains_on_under_its_masks(run, places, tmp_path, capsys):
    compressed = tmp_path / "u60"
    command = f"compress {run} --target u60 --out {compressed}"
    assert main(command.split()) == 0
    text = capsys.readouterr().out
    assert "bert/layer0/output/kernel" in text
    assert "% compressed to 60 % uniform. Stored in" in text
    facts = json.loads((compressed / "compression.json").read_text())
    assert facts["target"] == "u60"
    assert main(f"evaluate {compressed}".split()) == 0
    results = load_results(compressed / "evaluation.json")
    (entry,) = results["methods"]["cram_plus"]["runs"]
    assert entry["pruned"] == {"dense": facts["f1"]}

    tuned = tmp_path / "tuned"
    command = (
        f"train squad_small_sparse_finetune --run {tuned} --init-from {compressed} "
        f"--evaluate-every 1 --epochs 3 --patience 1 {SIZES}"
    )
    capsys.readouterr()
    assert main([*command.split(), *places.split()]) == 0
    assert "the best model: f1" in capsys.readouterr().out
    before, _ = checkpoints.read_model(compressed)
    after, _ = checkpoints.read_model(tuned)
    encoder = before["bert"]["layer0"], after["bert"]["layer0"]
    for one, other in zip(*map(jax.tree.leaves, encoder), strict=True):
        if one.ndim == 2:
            np.testing.assert_array_equal(one == 0, other == 0)
            assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "name", "modules"),
    [
        ("--format litert", "text.tflite", ("litert_converter", "ai_edge_litert")),
        ("--format coreml", "text.mlpackage", ("coremltools", "stablehlo_coreml")),
        # The target leaves embeddings and head unrounded, the file does not.
        ("--target 4bit --format packed", "text.safetensors", ("llvmlite",)),
        ("--target 4bit@32 --format onnx", "text.onnx", ("onnxruntime",)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_exported_to_engines(run, tmp_path, capsys, options, name, modules):
    for module in modules:
        pytest.importorskip(module, reason=f"needs the extra {options.split()[-1]}")
    assert main(f"export {run} --out {tmp_path / name} {options}".split()) == 0
    text = capsys.readouterr().out
    assert "F1 " in text
    assert ("F1 of the file" in text) != name.endswith("mlpackage")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_model_is_exported_as_hugging_face_stores_it(run, tmp_path, capsys):
    out = tmp_path / "exported"
    assert main(f"export {run} --out {out}".split()) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
    }
    loaded = load_bert(out, "question_answering")
    assert loaded.initialized == loaded.unused == ()
    params, _ = checkpoints.read_model(run)
    np.testing.assert_array_equal(
        np.asarray(loaded.model.qa_outputs.kernel[...]), params["qa_outputs"]["kernel"]
    )


def test_an_export_does_not_replace_a_run_or_its_weights(run, tmp_path, capsys):
    other, weights = tmp_path / "other", tmp_path / "weights"
    shutil.copytree(run, other)
    shutil.copytree(run, tmp_path / "mine")
    before = (other / "config.json").read_text()
    config = dataclasses.replace(load_config(run), weights=str(weights))
    save_config(tmp_path / "mine", config)
    for source, out, what in (
        (run, other, "directory of a run"),
        (run, run, "directory of a run"),
        (tmp_path / "mine", weights, "weights of the run"),
    ):
        assert main(f"export {source} --out {out}".split()) == 1
        assert f"out must not be the {what}, got {out}" in capsys.readouterr().err
    assert (other / "config.json").read_text() == before
    assert not weights.exists()


def test_a_resumed_run_equals_an_uninterrupted_one(
    text_config, text_data, text_task, text_step, text_run, progress, tmp_path
):
    whole, state = text_run
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "80")
    resumed = train(
        text_config,
        part,
        text_data,
        text_task,
        progress,
        train_step=text_step,
        resume=True,
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, jax.random.key_data(state.key)),
        (resumed.params, jax.random.key_data(resumed.key)),
    )
    moments = [optax.tree.get(s.opt_state, "mu") for s in (state, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *moments)
    assert (part / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.fixture
def complaint(capsys, places, weights):
    """What a training that cannot start says, with other flags than the right ones."""
    flags = dict(zip(*[iter(places.split())] * 2, strict=True))
    flags["--weights"] = str(weights)

    def complain(name="squad_small", sizes=SIZES, **changes):
        chosen = flags | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
        places = [w for f, v in chosen.items() if v is not None for w in (f, str(v))]
        assert main(["train", name, *sizes.split(), *places]) == 1
        return capsys.readouterr().err

    return complain


def test_what_is_not_named_or_missing_is_one_message(complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "with --weights, or a run's with --init-from" in complaint(weights=None)
    assert "config.json is missing" in complaint(weights="empty")
    assert "no.json is missing; it should be SQuAD" in complaint(train_file="no.json")
    assert "no.json is missing; it should be SQuAD" in complaint(eval_file="no.json")
    assert "no.txt is missing; it is the vocab" in complaint(vocabulary="no.txt")
    name = "squad_small_sparse_finetune"
    assert "name a run's directory with --init-from" in complaint(name)
    assert "init_from must be a run's directory, got 'x'" in complaint(
        name, init_from="x"
    )
    message = complaint(name, init_from="empty", vocabulary=None, weights=None)
    assert "with --weights, or the vocabulary with --vocabulary" in message
    # Nothing was claimed for a run that could not start.
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


def test_files_that_do_not_hold_what_they_should_are_one_message(
    complaint, facts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "facts.json"
    file.write_text("{")
    assert "facts.json is not JSON" in complaint(train_file=file)
    text = facts.read_text()
    file.write_text(text.replace('"answer_start": 43', '"answer_start": 44', 1))
    assert text != file.read_text()
    assert "must read '1874' at answer_start=44" in complaint(train_file=file)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na")
    message = complaint(vocabulary=tmp_path)
    assert "has 5 entries, but the weights are for vocab_size=128" in message
    message = complaint(sizes=SIZES.replace("hidden-size 16", "hidden-size 32"))
    assert "has hidden_size=16, but squad_small is configured for" in message
    assert "for these weights add --model.hidden-size 16" in message


def test_a_head_of_another_task_does_not_fit(run, places, capsys, store_rows, tmp_path):
    """From answers to classes: the pooler is missing, and the message says it."""
    features = {"sentence": tfds.features.Text(), "label": np.int32}
    rows = [{"sentence": "the lighthouse is tall", "label": i % 2} for i in range(8)]
    splits = {"train": rows, "validation": rows}
    store_rows(tmp_path, "glue", "sst2", "2.0.0", features, splits)
    command = (
        f"train sst2_small --init-from {run} --data-dir {tmp_path} "
        f"--run {tmp_path / 'run'} {SIZES}"
    )
    vocabulary = places[places.index("--vocabulary") :]
    assert main([*command.split(), *vocabulary.split()]) == 1
    assert "bert/pooler/bias is missing there" in capsys.readouterr().err


def test_allocation_looks_at_every_dense_layer_of_the_encoder(run, capsys):
    """SparseGPT, refitted; SPDY, uniform and global masks at two thirds of the cost."""
    command = f"allocate {run} --speedup 1.5 --levels 3 --starts 1 --examples 8"
    layerwise = "--layerwise.examples 8 --layerwise.batch 4"
    assert main(f"{command} {layerwise} --pruner rg".split()) == 0
    assert "f1 (%) at equal multiply-adds" in capsys.readouterr().out
    found = json.loads((run / "allocation-multiply_adds-rg.json").read_text())["1.5x"]
    attention = [f"attention/{n}" for n in ("query", "key", "value", "output")]
    layers = (*attention, "intermediate", "output")
    kernels = {f"bert/layer0/{name}/kernel" for name in layers}
    assert set(found["sparsities"]) == kernels
    for method in found["methods"].values():
        assert method["share"] <= 1 / 1.5 + 0.01


def test_a_lottery_on_text_begins_with_the_weights(places, weights, tmp_path, capsys):
    command = (
        f"lottery squad_small --rounds 1 --share 0.5 --out {tmp_path} --epochs 1 "
        f"--weights {weights} --optimizer.rule none {SIZES}"
    )
    assert main([*command.split(), *places.split()]) == 0
    assert "f1 (%)" in capsys.readouterr().out
    start, _ = checkpoints.read_model(tmp_path / "early")
    model = load_bert(weights, "question_answering").model
    kernel = np.asarray(model.bert.layer0.output.kernel[...])
    np.testing.assert_array_equal(start["bert"]["layer0"]["output"]["kernel"], kernel)
    ticket, _ = checkpoints.read_model(tmp_path / "round1")
    layers = jax.tree.leaves(ticket["bert"]["layer0"])
    matrices = [leaf for leaf in layers if leaf.ndim == 2]
    zeros = sum(int((leaf == 0).sum()) for leaf in matrices)
    assert zeros == sum(leaf.size for leaf in matrices) // 2
    assert ticket["bert"]["embeddings"]["word"]["embedding"].all()
    assert main(f"evaluate {tmp_path / 'round1'}".split()) == 0
