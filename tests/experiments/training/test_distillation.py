"""Learning from the outputs of a trained network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from experiments.config import DistillationConfig
from experiments.errors import ConfigError, RunError
from experiments.images.config import ModelConfig
from experiments.images.task import classification
from experiments.runs import checkpoints
from experiments.text.question_answering import question_answering
from experiments.training.distillation import (
    Teacher,
    distilled,
    divergence,
    load_teacher,
    with_teacher,
)
from experiments.training.loop import train
from experiments.training.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
LOGITS, TEACHER = RNG.normal(size=(2, 6, 5)).astype(np.float32)


def reference(logits, teacher, temperature):
    """T^2 sum p (log p - log q), in float64."""
    wanted, got = (
        scipy.special.log_softmax(x.astype(float) / temperature, axis=-1)
        for x in (teacher, logits)
    )
    return temperature**2 * np.sum(np.exp(wanted) * (wanted - got), axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_that_of_the_softened_outputs(temperature):
    got = divergence(LOGITS, TEACHER, temperature)
    expected = reference(LOGITS, TEACHER, temperature)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(divergence(LOGITS, LOGITS, temperature), 0, atol=1e-6)


def test_its_gradient_is_the_difference_of_the_softened_probabilities():
    got = jax.grad(lambda x: divergence(x, TEACHER, 3.0).sum())(LOGITS)
    ours, wanted = (scipy.special.softmax(x / 3, axis=-1) for x in (LOGITS, TEACHER))
    np.testing.assert_allclose(got, 3 * (ours - wanted), atol=1e-5)


def test_several_outputs_count_alike_and_numbers_by_their_squared_difference():
    pair = divergence((LOGITS, 2 * LOGITS), (TEACHER, TEACHER), 1.0)
    parts = [reference(scale * LOGITS, TEACHER, 1.0) for scale in (1, 2)]
    np.testing.assert_allclose(pair, np.mean(parts, axis=0), rtol=1e-5)
    numbers = divergence(LOGITS[:, :1], TEACHER[:, :1], 2.0)
    difference = LOGITS[:, 0] - TEACHER[:, 0]
    np.testing.assert_allclose(numbers, difference**2, rtol=1e-5)


def test_the_weight_shares_the_loss_between_labels_and_teacher():
    rows = np.arange(6.0)
    batch = {"teacher": TEACHER}
    got = distilled(rows, LOGITS, batch, DistillationConfig(0.3))
    expected = 0.7 * rows + 0.3 * reference(LOGITS, TEACHER, 1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert distilled(rows, LOGITS, {}, DistillationConfig(0.3)) is rows


@pytest.fixture(scope="module")
def teacher(config, data, task, tmp_path_factory):
    """A stored model of other weights than the student starts with."""
    run = tmp_path_factory.mktemp("runs") / "teacher"
    checkpoints.save_model(run, config, *task.init(7))
    return run


@pytest.fixture(scope="module")
def student(config, teacher):
    """It is to learn from the teacher only, and is narrower."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layer_widths=(3, 2, 3, 5, 6)),
        optimizer=dataclasses.replace(config.optimizer, rule="none", warmup=0.0),
        teacher=str(teacher),
        distillation=DistillationConfig(weight=1.0, temperature=2.0),
        label_smoothing=0.1,
        evaluate_every=0,
    )


@pytest.fixture(scope="module")
def setting(student, data):
    """The task of the student, its teacher and its compiled step."""
    task = classification(student, data)
    teacher = load_teacher(student, data, task)
    return task, teacher, make_train_step(student, data, task, teacher=teacher)


def test_with_all_the_weight_on_the_teacher_labels_do_not_matter(
    student, data, setting
):
    task, _, step = setting
    batch = data.train.take(range(8))
    others = batch | {"label": 3 - batch["label"]}
    states = [step(init_state(student, data, task), rows) for rows in (batch, others)]
    jax.tree.map(np.testing.assert_array_equal, states[0][1], states[1][1])
    params = [state.params for state, _ in states]
    jax.tree.map(np.testing.assert_array_equal, *params)
    before, _ = task.init(student.seed)
    assert jnp.any(params[0]["head"]["kernel"] != before["head"]["kernel"])


def test_a_run_with_a_teacher_resumes_exactly(
    student, data, setting, tmp_path, progress
):
    task, _, step = setting
    whole = train(student, tmp_path / "whole", data, task, progress, train_step=step)
    part = tmp_path / "part"
    train(student, part, data, task, progress, train_step=step, max_steps=3)
    # This one reads the teacher itself.
    resumed = train(student, part, data, task, progress, resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


def test_rows_of_text_learn_the_start_and_the_end_of_an_answer(
    text_config, text_data, text_task
):
    params, _ = text_task.init(0)
    batch = text_data.train.take(range(4))
    taught = with_teacher(batch, Teacher(text_task.predict, (params, {})))
    start, end = taught["teacher"]
    assert start.shape == end.shape == (4, text_config.data.max_length)
    rate = dataclasses.replace(text_config.model, hidden_dropout_prob=0.0)
    model = dataclasses.replace(rate, attention_probs_dropout_prob=0.0)
    task = question_answering(dataclasses.replace(text_config, model=model))
    loss, own = (jax.jit(task.loss_fn)(params, {}, b)[0] for b in (taught, batch))
    # Half of the loss is of the labels; it is no way from itself.
    np.testing.assert_allclose(loss, own / 2, rtol=1e-5)


def test_a_teacher_that_cannot_be_one_is_refused(student, data, task):
    missing = dataclasses.replace(student, teacher="nowhere")
    with pytest.raises(RunError, match="nowhere is not a run"):
        load_teacher(missing, data, task)
    fewer = data._replace(classes=3)
    message = r"head/bias is \(4,\) there, expected \(3,\)"
    with pytest.raises(ConfigError, match=message):
        load_teacher(student, fewer, classification(student, fewer))
    other = dataclasses.replace(student.data, classes=(1, 2, 3, 4))
    with pytest.raises(ConfigError, match=r"must be for \('digits', \(1, 2, 3, 4\)"):
        load_teacher(dataclasses.replace(student, data=other), data, task)


def test_the_code_of_a_teachers_own_network_is_not_run(
    student, data, task, config, tmp_path
):
    model = ModelConfig(module="package:factory")
    own = dataclasses.replace(config, model=model)
    checkpoints.save_model(tmp_path / "own", own, *task.init(0))
    config = dataclasses.replace(student, teacher=str(tmp_path / "own"))
    with pytest.raises(ConfigError, match="whose code is run only for a student of"):
        load_teacher(config, data, task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight must be above 0 and at most 1, got 0.0"),
        ({"weight": 1.5}, "weight must be above 0 and at most 1, got 1.5"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_weights_and_temperatures_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(**options)
