"""Reads and writes the weights of a BERT in Hugging Face's form.

A directory holds ``config.json`` and ``model.safetensors``, or the older
``pytorch_model.bin``. A dense layer's ``weight`` is (outputs, inputs) there, and our
``kernel`` is (inputs, outputs).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from safetensors.numpy import save_file

from cram_jax.writing import replacing
from experiments.errors import ConfigError, WeightsError
from experiments.runs.stored_config import read_fields
from experiments.text.bert import (
    Bert,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)
from experiments.text.config import BertConfig
from experiments.weight_files import read_tensors

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

Model = Bert | BertForQuestionAnswering | BertForSequenceClassification

HEADS = {
    None: Bert,
    "question_answering": BertForQuestionAnswering,
    "classification": BertForSequenceClassification,
}

# Our modules by their names; those of a layer and of the encoder do not overlap.
MODULES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
    "pooler": "pooler.dense",
    "qa_outputs": "qa_outputs",
    "classifier": "classifier",
}
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

# What a checkpoint need not have.
OPTIONAL = ("pooler", "qa_outputs", "classifier")


class Loaded(NamedTuple):
    """A model that was read.

    Attributes:
      model: with float32 parameters.
      initialized: tensors that the file lacks and that were drawn at random: the task
        head, and the pooler if there is one.
      unused: tensors of the file that the model does not have, such as another task's
        head.
    """

    model: Model
    initialized: tuple[str, ...]
    unused: tuple[str, ...]


def load_bert(
    directory: str | Path,
    head: str | None = None,
    *,
    labels: int | None = None,
    dtype: Any = None,
    seed: int = 0,
    new_head: bool = False,
) -> Loaded:
    """Reads an encoder, and the task head if it is there.

    The names may start with ``bert.`` or not, and a layer norm's ``gamma`` and ``beta``
    are understood. The encoder must be complete, without further tensors.

    Args:
      directory: holds ``config.json`` and the weights.
      head: None for the encoder with its pooler, "question_answering" or
        "classification".
      labels: of the classifier; by default as many as the file's has, or 2.
      dtype: of the computation, see Bert.
      seed: for tensors that the file lacks.
      new_head: draw the head at random even if the file has one, perhaps of another
        size.

    Returns:
      The model, the names of tensors drawn at random, and those of unused ones.

    Raises:
      ConfigError: an argument or ``config.json`` asks for something unsupported.
      WeightsError: the directory lacks a file, or a tensor is missing, unknown,
        misshapen or not of floating point.
    """
    if head not in HEADS:
        raise ConfigError(f"head must be one of {list(HEADS)}, got {head!r}")
    if labels is not None and (head != "classification" or labels < 1):
        raise ConfigError(
            f'labels must be positive and needs head="classification", got {labels} '
            f"with head={head!r}"
        )
    config = read_config(directory)
    tensors, file = _read_tensors(Path(directory))
    if new_head:
        heads = ("classifier.", "qa_outputs.")
        tensors = {n: x for n, x in tensors.items() if not n.startswith(heads)}
    options = {"dtype": dtype}
    if head == "classification":
        stored = tensors.get("classifier.weight", np.empty((2, 0)))
        options["labels"] = labels or len(stored)

    def make() -> Model:
        return HEADS[head](config, **options, rngs=nnx.Rngs(jax.random.key(seed)))

    def draw() -> list[jax.Array]:
        leaves = _flat(make())[1]
        return [leaves[path] for path in fresh]

    graph, wanted = _flat(nnx.eval_shape(make))
    params, fresh = _take(wanted, tensors, file)
    if fresh:
        # Compiled, so that tensors that the file holds are not drawn.
        params |= zip(fresh, jax.jit(draw)(), strict=True)
    model = nnx.merge(graph, traverse_util.unflatten_dict(params))
    return Loaded(model, tuple(fresh.values()), tuple(tensors))


def save_bert(directory: str | Path, model: Model, labels: Sequence[str] = ()) -> None:
    """Writes ``config.json`` and ``model.safetensors``, as transformers reads them.

    If a Bert has no pooler, transformers will draw one at random.

    Args:
      directory: created if missing; the two files in it are replaced.
      model: with its parameters, as trained or as compressed.
      labels: the names of the classes of a classifier, by default LABEL_0 and so on.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    is_bare = isinstance(model, Bert)
    bert = model if isinstance(model, Bert) else model.bert
    settings = {
        "architectures": ["BertModel" if is_bare else type(model).__name__],
        "model_type": "bert",
        **dataclasses.asdict(bert.config),
    }
    if isinstance(model, BertForSequenceClassification):
        count = model.classifier.out_features
        names = labels or [f"LABEL_{i}" for i in range(count)]
        settings["id2label"] = {str(i): name for i, name in enumerate(names)}
        settings["label2id"] = {name: i for i, name in enumerate(names)}
    tensors = {}
    for path, leaf in _flat(model)[1].items():
        leaf = np.asarray(leaf).T if path[-1] == "kernel" else np.asarray(leaf)
        prefix = "bert." if path[0] == "bert" else ""
        # The file is written from the raw memory: a view would be garbled.
        tensors[prefix + _name(path)] = np.ascontiguousarray(leaf)
    # transformers refuses a file that does not name its framework.
    with replacing(directory / "model.safetensors") as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    with replacing(directory / "config.json") as beside:
        beside.write_text(json.dumps(settings, indent=2) + "\n")


def _flat(model: Model) -> tuple[Any, dict[tuple[str, ...], Any]]:
    graph, params = nnx.split(model, nnx.Param)
    return graph, traverse_util.flatten_dict(nnx.to_pure_dict(params))


def _name(path: tuple[str, ...]) -> str:
    """The tensor of a leaf, without the prefix ``bert.``."""
    *modules, leaf = path
    modules = modules[1:] if modules[0] == "bert" else modules
    layer = ""
    if modules[0].startswith("layer"):
        layer = f"encoder.layer.{modules[0].removeprefix('layer')}."
        modules = modules[1:]
    return f"{layer}{MODULES['/'.join(modules)]}.{LEAVES[leaf]}"


def _take(
    wanted: dict[tuple[str, ...], Any], tensors: dict[str, np.ndarray], file: Path
) -> tuple[dict[tuple[str, ...], jax.Array], dict[tuple[str, ...], str]]:
    """Moves tensors to their leaves; returns the leaves, and those to be drawn."""
    owners = {name.split(".")[0] for name in tensors}
    params, fresh = {}, {}
    for path, leaf in wanted.items():
        name, is_kernel = _name(path), path[-1] == "kernel"
        shape = leaf.shape[::-1] if is_kernel else leaf.shape
        if name not in tensors:
            owner = name.split(".")[0]
            if owner not in OPTIONAL or owner in owners:
                raise WeightsError(f"{file} lacks {name}, expected with shape {shape}")
            fresh[path] = name
            continue
        tensor = tensors.pop(name)
        if tensor.shape != shape:
            raise WeightsError(
                f"{file}: {name} must have shape {shape}, got {tensor.shape}"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise WeightsError(
                f"{file}: {name} must be of floating point, got {tensor.dtype}"
            )
        params[path] = jnp.asarray(tensor.T if is_kernel else tensor, leaf.dtype)
    extra = [name for name in tensors if name.startswith(("embeddings.", "encoder."))]
    if extra:
        raise WeightsError(
            f"{file} holds {extra[0]} of shape {tensors[extra[0]].shape}, for which a "
            f"model of its config.json has no place, and {len(extra) - 1} more like it"
        )
    return params, fresh


def read_config(directory: str | Path) -> BertConfig:
    """Reads ``config.json``.

    Raises:
      ConfigError: it asks for something unsupported.
      WeightsError: it is missing or damaged.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path} is missing; a directory of a BERT model has one")
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} must hold an object")
    for name, supported in {
        "model_type": "bert",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }.items():
        value = settings.get(name, supported)
        if value != supported:
            raise ConfigError(f"{path}: {name} must be {supported!r}, got {value!r}")
    names = {field.name for field in dataclasses.fields(BertConfig)}
    return read_fields(BertConfig, {k: v for k, v in settings.items() if k in names})


def _read_tensors(directory: Path) -> tuple[dict[str, np.ndarray], Path]:
    """The tensors, with uniform names, and the file that they come from."""
    there = [name for name in WEIGHTS if (directory / name).is_file()]
    if not there:
        raise WeightsError(f"{directory} holds none of {', '.join(WEIGHTS)}")
    file = directory / there[0]
    tensors: dict[str, np.ndarray] = {}
    for stored, tensor in read_tensors(file).items():
        if stored.endswith("position_ids"):  # a buffer of older files: 0, 1, 2, ...
            continue
        name = stored.removeprefix("bert.")
        for old, new in (("gamma", "weight"), ("beta", "bias")):
            if name.endswith(f"LayerNorm.{old}"):
                name = name.removesuffix(old) + new
        if name in tensors:
            raise WeightsError(f"{file} holds {name} twice, also as {stored}")
        tensors[name] = tensor
    return tensors, file
