"""The task of SQuAD: its loss, its dropout, its scores, and that it learns."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cram_jax
from experiments.compression.targets import projector
from experiments.sharding import assemble, make_mesh, state_shardings
from experiments.text.kind import load_text
from experiments.text.network import ENCODER
from experiments.text.question_answering import make_network, question_answering
from experiments.text.squad import read_json
from experiments.training.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


def first_batches(config, data, steps):
    return data.train.training_batches(config.data.batch_size, 0, 0, steps)


@pytest.fixture(scope="module")
def params(text_task):
    return text_task.init(0)[0]


@pytest.fixture(scope="module")
def batch(text_config, text_data):
    return next(first_batches(text_config, text_data, 1))


@pytest.fixture(scope="module")
def logits(text_config, params, batch):
    """Start and end logits, without dropout, as float64."""
    model = make_network(text_config).module(params)
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = model(*(jnp.asarray(batch[name]) for name in names), training=False)
    return [np.asarray(scores, np.float64) for scores in found]


def cross_entropy(logits, batch, smoothing):
    """By the definition, a row at a time."""
    rows = []
    for row, mask in enumerate(batch["attention_mask"]):
        for scores, place in zip(logits, (batch["start"], batch["end"]), strict=True):
            wanted = smoothing * mask / mask.sum()
            wanted[place[row]] += 1 - smoothing
            log_total = np.log(np.exp(scores[row]).sum())
            rows.append(np.sum(wanted * (log_total - scores[row])))
    return np.mean(rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_mean_cross_entropy_of_start_and_end(
    smoothing, text_config, params, batch, logits
):
    still = dataclasses.replace(
        text_config.model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = dataclasses.replace(text_config, model=still, label_smoothing=smoothing)
    loss, statistics = question_answering(config).loss_fn(params, {}, batch)
    # float32 against float64
    assert loss == pytest.approx(cross_entropy(logits, batch, smoothing), rel=1e-5)
    assert statistics == {}


def test_the_evaluation_loss_has_neither_dropout_nor_smoothing(
    text_task, params, batch, logits
):
    loss = text_task.evaluation_loss(params, {}, batch)
    assert loss == pytest.approx(cross_entropy(logits, batch, 0.0), rel=1e-5)
    one = {name: array[:1] for name, array in batch.items()}
    first = cross_entropy([scores[:1] for scores in logits], one, 0.0)
    assert text_task.evaluation_loss(params, {}, one) == pytest.approx(first, rel=1e-5)


def test_dropout_is_a_function_of_the_runs_key(
    text_config, text_data, text_task, text_step, batch
):
    losses = []
    for seed in (0, 0, 1):
        state = init_state(text_config, text_data, text_task)
        _, metrics = text_step(state._replace(key=jax.random.key(seed)), batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] != losses[2]


def test_the_compressed_pass_has_the_dropout_of_the_dense_one(
    text_config, text_data, text_task, text_step, params, batch
):
    """The loss at the perturbed and pruned parameters, with the key of the first."""
    state = init_state(text_config, text_data, text_task)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 0)

    @jax.jit
    def loss_and_gradient(params):
        return jax.value_and_grad(text_task.loss_fn, has_aux=True)(
            params, {}, batch, key
        )

    (dense, _), gradient = loss_and_gradient(params)
    gradient["bert"]["embeddings"] = jax.tree.map(
        jnp.zeros_like, gradient["bert"]["embeddings"]
    )
    perturbed = optax.tree.add_scale(params, text_config.optimizer.rho, gradient)
    pruned, _ = cram_jax.compress(perturbed, projector("u50", filters=ENCODER))
    (compressed, _), _ = loss_and_gradient(pruned)
    _, metrics = text_step(state, batch)
    # float32, and two compilations
    assert metrics["loss"] == pytest.approx(float(dense), rel=1e-4)
    assert metrics["compressed_loss"] == pytest.approx(float(compressed), rel=1e-4)


def test_a_part_of_the_batch_serves_for_the_compressed_gradient(
    text_task, params, batch
):
    key = jax.random.key(0)
    part = cram_jax.subsampled(text_task.loss_fn, "batch", every=4)
    loss, _ = part(params, batch_stats={}, batch=batch, dropout_key=key)
    chosen = {name: array[::4] for name, array in batch.items()}
    assert loss == text_task.loss_fn(params, {}, chosen, key)[0]


def test_filling_of_the_last_batch_does_not_count(text_config, text_data, params):
    count = len(text_data.evaluation.windows.example)
    assert count % text_config.data.evaluation_batch
    results = []
    for size in (text_config.data.evaluation_batch, count):
        sized = dataclasses.replace(text_config.data, evaluation_batch=size)
        task = question_answering(dataclasses.replace(text_config, data=sized))
        results.append(task.evaluate(params, {}, text_data.evaluation))
    assert list(results[0]) == ["f1", "exact_match", "loss"]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_few_questions_are_learnt_by_heart(text_run, text_data, text_task):
    """All of it: windows, loss, both gradients, Adam, logits to answers, scores."""
    run, state = text_run
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["loss"] > 3.5  # at first evenly over 48 tokens: log 48 is 3.9
    result = text_task.evaluate(state.params, {}, text_data.evaluation)
    # 81 and 91 when it was written.
    assert result["exact_match"] > 60
    assert result["f1"] > 75
    assert lines[-1]["eval_f1"] == result["f1"]


def test_twenty_steps_on_real_questions_lower_the_loss(
    shared, text_config, text_task, text_step, make_vocabulary, tmp_path
):
    file = shared / "datasets" / "squad" / "squad-dev-articles-train.json"
    make_vocabulary(tmp_path, read_json(file)[:500])
    data = dataclasses.replace(text_config.data, examples=8, evaluation_examples=8)
    config = dataclasses.replace(
        text_config,
        data=data,
        train_file=str(file),
        eval_file=str(file),
        vocabulary=str(tmp_path),
    )
    loaded = load_text(config)
    state, losses = init_state(config, loaded, text_task), []
    for batch in first_batches(config, loaded, 20):
        state, metrics = text_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(48), abs=0.5)  # evenly over the tokens
    assert np.mean(losses[-3:]) < 2.8


@pytest.mark.several_devices
def test_steps_on_a_mesh_are_those_of_one_device(
    text_config, text_data, text_task, text_step
):
    mesh = make_mesh("data=2,fsdp=2", text_config.data.batch_size)
    one = init_state(text_config, text_data, text_task)
    other = jax.device_put(one, state_shardings(mesh, one))
    one = jax.tree.map(jnp.copy, one)
    step = make_train_step(text_config, text_data, text_task, mesh)
    own = np.arange(text_config.data.batch_size)
    for batch in first_batches(text_config, text_data, 2):
        one, here = text_step(one, batch)
        cut = {
            name: assemble(mesh, rows, own, len(own)) for name, rows in batch.items()
        }
        other, there = step(other, cut)
        # Sums over devices round otherwise.
        assert here["loss"] == pytest.approx(float(there["loss"]), rel=1e-3)
    kernel = other.params["bert"]["layer0"]["output"]["kernel"]
    assert kernel.sharding.spec[0] == "fsdp"
    found = text_task.evaluate(other.params, {}, text_data.evaluation)
    expected = text_task.evaluate(one.params, {}, text_data.evaluation)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)
