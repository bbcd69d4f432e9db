"""BERT's weights: Hugging Face's numbers, names and files."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from experiments.errors import ConfigError, WeightsError
from experiments.text.bert import Bert
from experiments.text.config import BertConfig
from experiments.text.huggingface import HEADS, load_bert, save_bert
from tests.data.bert.record import CASES, FILE, INPUTS, SMALL, draw, draw_inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEAD_OF = {
    "BertModel": None,
    "BertForQuestionAnswering": "question_answering",
    "BertForSequenceClassification": "classification",
}

# Enough for what goes through files and is never computed with.
ONE_LAYER = SMALL | {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def recorded():
    with np.load(FILE) as file:
        return dict(file)


def write(directory, config, tensors):
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def call(model, inputs):
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def forward(params, inputs):
        return nnx.merge(graph, params, copy=True)(*inputs, training=False)

    return forward(params, inputs)


def outputs(model, inputs):
    """Under transformers' names."""
    found = call(model, inputs)
    if isinstance(model, Bert):
        return {"last_hidden_state": found.hidden, "pooler_output": found.pooled}
    if isinstance(found, tuple):
        return {"start_logits": found[0], "end_logits": found[1]}
    return {"logits": found}


def leaves(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_same_weights(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, leaves(ours), leaves(theirs))


@pytest.fixture
def stored(recorded, tmp_path):
    """Writes the weights of a case as drawn, and returns its folder and tensors."""

    def make(case):
        tensors = draw(json.loads(str(recorded[f"{case}/shapes"])))
        total = sum(np.abs(t).sum(dtype=np.float64) for t in tensors.values())
        # If this fails, NumPy draws other numbers than when they were recorded.
        assert total == pytest.approx(recorded[f"{case}/total"], rel=1e-12)
        write(tmp_path, CASES[case][1], tensors)
        return tmp_path, tensors

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_arithmetic_is_that_of_transformers(recorded, stored, case):
    name, config = CASES[case]

    def compare(model, count, prefix, tolerance):
        for key, found in outputs(model, inputs[:count]).items():
            expected = recorded[f"{case}/{prefix}{key}"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)

    with jax.enable_x64(True):
        inputs = [jnp.asarray(draw_inputs(config)[key]) for key in INPUTS]
        loaded = load_bert(stored(case)[0], HEAD_OF[name])
        assert (loaded.initialized, loaded.unused) == ((), ())
        graph, params = nnx.split(loaded.model, nnx.Param)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        model = nnx.merge(graph, wide)
        # Float64 on both sides; without a mask and segments, too.
        compare(model, 3, "", 1e-12)
        compare(model, 1, "ids_alone/", 1e-12)
        # Float32 here: three layers' rounding of numbers up to 4.
        compare(loaded.model, 3, "", 1e-5)


def test_pretrained_weights_give_transformers_numbers(recorded, minilm):
    loaded = load_bert(minilm)
    assert not loaded.initialized
    assert not loaded.unused
    inputs = [jnp.asarray(recorded[f"minilm/{name}"]) for name in INPUTS]
    for key, found in outputs(loaded.model, inputs).items():
        np.testing.assert_allclose(found, recorded[f"minilm/{key}"], atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_saved_is_what_is_loaded(tmp_path, head):
    config = BertConfig(**ONE_LAYER, classifier_dropout=0.25)
    options = {"labels": 3} if head == "classification" else {}
    model = HEADS[head](config, **options, rngs=nnx.Rngs(0))
    save_bert(tmp_path / "new", model)
    loaded = load_bert(tmp_path / "new", head)
    assert_same_weights(loaded.model, model)
    assert (loaded.initialized, loaded.unused) == ((), ())
    encoder = loaded.model if head is None else loaded.model.bert
    assert encoder.config == config


def test_a_head_of_another_size_may_be_replaced(tmp_path):
    make = HEADS["classification"]
    model = make(BertConfig(**ONE_LAYER), labels=5, rngs=nnx.Rngs(0))
    save_bert(tmp_path, model, labels=["a", "b", "c", "d", "e"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"]["4"] == "e"
    assert config["label2id"] == dict(zip("abcde", range(5), strict=True))
    with pytest.raises(WeightsError, match=r"classifier.* must have shape"):
        load_bert(tmp_path, "classification", labels=3)
    loaded = load_bert(tmp_path, "classification", labels=3, new_head=True)
    assert loaded.model.classifier.out_features == 3
    assert loaded.initialized == ("classifier.bias", "classifier.weight")
    assert_same_weights(loaded.model.bert, model.bert)


@pytest.mark.parametrize("case", ["encoder", "classification"])
def test_the_names_that_go_out_are_those_that_came_in(stored, tmp_path, case):
    folder, tensors = stored(case)
    save_bert(tmp_path / "out", load_bert(folder, HEAD_OF[CASES[case][0]]).model)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_old_names_and_buffers_and_prefixes_are_understood(stored, tmp_path):
    folder, tensors = stored("encoder")
    expected = load_bert(folder).model
    old = {
        "bert."
        + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in tensors.items()
    }
    assert sum(name.endswith((".gamma", ".beta")) for name in old) == 10
    old["bert.embeddings.position_ids"] = np.arange(9)[None]
    old["cls.predictions.bias"] = np.zeros(37, np.float32)
    write(tmp_path, SMALL, old)
    loaded = load_bert(tmp_path)
    assert_same_weights(loaded.model, expected)
    assert loaded.unused == ("cls.predictions.bias",)


def test_a_head_that_the_file_lacks_is_drawn_from_the_seed(stored):
    folder, tensors = stored("encoder")
    one, same, other = (
        load_bert(folder, "question_answering", seed=seed) for seed in (0, 0, 1)
    )
    assert set(one.initialized) == {"qa_outputs.weight", "qa_outputs.bias"}
    assert set(one.unused) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert_same_weights(one.model, same.model)
    kernel = one.model.qa_outputs.kernel[...]
    assert 0.005 < jnp.std(kernel) < 0.04  # 24 draws of deviation 0.02
    assert not jnp.array_equal(kernel, other.model.qa_outputs.kernel[...])
    np.testing.assert_array_equal(
        one.model.bert.layer1.attention.key.kernel[...],
        tensors["encoder.layer.1.attention.self.key.weight"].T,
    )


def test_a_pooler_that_the_file_lacks_is_drawn(stored):
    loaded = load_bert(stored("question_answering")[0], "classification", labels=4)
    assert {name.split(".")[0] for name in loaded.initialized} == {
        "pooler",
        "classifier",
    }
    assert set(loaded.unused) == {"qa_outputs.weight", "qa_outputs.bias"}
    assert loaded.model.classifier.kernel.shape == (12, 4)


def test_half_precision_is_widened(stored):
    folder, tensors = stored("encoder")
    halves = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    write(folder, SMALL, halves)
    bias = load_bert(folder).model.pooler.bias[...]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, halves["pooler.dense.bias"].astype(np.float32))


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (QUERY, None, f"lacks {QUERY}, expected with shape .12, 12."),
        ("pooler.dense.bias", None, "lacks pooler.dense.bias, expected with shape .12"),
        (
            "encoder.layer.0.intermediate.dense.weight",
            np.zeros((12, 20), np.float32),
            "intermediate.dense.weight must have shape .20, 12., got .12, 20.",
        ),
        (QUERY, np.zeros((12, 12), np.int8), "query.weight must be of floating point"),
        (
            "encoder.layer.2.output.dense.bias",
            np.zeros(12, np.float32),
            "layer.2.output.dense.bias of shape .12,., for which .* no place",
        ),
        (f"bert.{QUERY}", np.zeros((12, 12), np.float32), f"holds {QUERY} twice"),
    ],
)
def test_every_tensor_of_the_encoder_has_to_fit(stored, name, tensor, message):
    folder, tensors = stored("encoder")
    tensors.pop(name, None)
    write(folder, SMALL, tensors | ({} if tensor is None else {name: tensor}))
    with pytest.raises(WeightsError, match=message):
        load_bert(folder)


def test_the_labels_have_to_fit(stored):
    folder, _ = stored("classification")
    message = "classifier.bias must have shape .3,., got .5,."
    with pytest.raises(WeightsError, match=message):
        load_bert(folder, "classification", labels=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "translation"}, "head must be one of .*, got 'translation'"),
        ({"head": "classification", "labels": 0}, "labels must be positive .* got 0"),
        ({"labels": 3}, 'needs head="classification", got 3 with head=None'),
    ],
)
def test_arguments_are_checked(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_bert(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute', got 'rela"),
        ({"is_decoder": True}, "is_decoder must be False, got True"),
        ({"hidden_act": "gelu_new"}, "hidden_act must be 'gelu', got 'gelu_new'"),
        ({"num_attention_heads": 5}, "must divide hidden_size=12, got 5"),
    ],
)
def test_a_configuration_that_we_lack_is_refused(stored, changes, message):
    folder, tensors = stored("encoder")
    write(folder, SMALL | changes, tensors)
    with pytest.raises(ConfigError, match=message):
        load_bert(folder)


def test_files_have_to_be_there_and_whole(tmp_path):
    with pytest.raises(WeightsError, match="config.json is missing"):
        load_bert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json is not JSON"):
        load_bert(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        WeightsError, match="none of model.safetensors, .*pytorch_model"
    ):
        load_bert(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(WeightsError, match="model.safetensors cannot be read"):
        load_bert(tmp_path)


def test_a_pytorch_file_without_torch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="install torch, or convert it"):
        load_bert(tmp_path)


def test_a_pytorch_file_is_read_with_torch(stored):
    torch = pytest.importorskip("torch", reason="reads pytorch_model.bin")
    folder, tensors = stored("encoder")
    expected = load_bert(folder).model
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({name: torch.tensor(t) for name, t in tensors.items()}, file)
    assert_same_weights(load_bert(folder).model, expected)
    torch.save({"a": dataclasses.replace}, file)  # not a tensor: could run code
    with pytest.raises(WeightsError, match="PyTorch cannot read"):
        load_bert(folder)


@pytest.mark.parametrize("name", HEAD_OF)
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path, name):
    reason = "live parity; without them the recorded numbers stand in"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(transformers.BertConfig(**SMALL)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_bert(tmp_path / "theirs", HEAD_OF[name]).model
    save_bert(tmp_path / "ours", ours)
    again, information = type(theirs).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(information.values())
    inputs = draw_inputs(SMALL)
    tensors = {key: torch.tensor(value) for key, value in inputs.items()}
    found = outputs(ours, [jnp.asarray(inputs[key]) for key in INPUTS])
    for model in (theirs, again.eval()):
        with torch.no_grad():
            expected = model(**tensors)
        for key, value in found.items():
            np.testing.assert_allclose(value, expected[key].numpy(), atol=1e-5)
