"""Runs on text."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from experiments.config import Dtype, RunConfig, check, check_at_least, check_numbers
from experiments.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT, under Hugging Face's names; by default that of base.

    Attributes:
      vocab_size: entries of the vocabulary.
      hidden_size: features of a token.
      num_hidden_layers: encoder layers.
      num_attention_heads: heads of a layer; they share ``hidden_size`` evenly.
      intermediate_size: features between the two dense layers of a block.
      max_position_embeddings: tokens in the longest sequence.
      type_vocab_size: kinds of segments.
      layer_norm_eps: added to the variance.
      hidden_dropout_prob: dropout of the embeddings and of what a block adds.
      attention_probs_dropout_prob: dropout of the attention weights.
      classifier_dropout: dropout before the classifier; None: hidden_dropout_prob.
      hidden_act: "gelu", the exact one.
      initializer_range: standard deviation of the initial kernels and embeddings.
      layer_heads: heads of each layer if some were removed, as after ``shrink``; their
        size stays that of ``num_attention_heads`` heads. Hugging Face has no such
        field.
      layer_units: the same for the features between the two dense layers.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_heads: tuple[int, ...] = ()
    layer_units: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("layer_heads", "layer_units"):
            sizes = getattr(self, name)
            fits = len(sizes) in (0, self.num_hidden_layers)
            check(self, name, fits, f"one for each of {self.num_hidden_layers} layers")
            check(self, name, min(sizes, default=1) >= 1, "all at least 1")
        for entry in dataclasses.fields(self):
            name, value = entry.name, getattr(self, entry.name)
            if entry.type is int and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
            is_rate = name.endswith(("dropout_prob", "classifier_dropout"))
            if is_rate and value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {value!r}")
        for name in ("layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads must divide hidden_size={self.hidden_size}, got "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act != "gelu":
            raise ConfigError(f"hidden_act must be 'gelu', got {self.hidden_act!r}")

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def heads_of_layers(self) -> tuple[int, ...]:
        """Heads of each layer."""
        everywhere = (self.num_attention_heads,) * self.num_hidden_layers
        return self.layer_heads or everywhere

    @property
    def units_of_layers(self) -> tuple[int, ...]:
        """Features between the two dense layers of each layer."""
        everywhere = (self.intermediate_size,) * self.num_hidden_layers
        return self.layer_units or everywhere

    @property
    def is_shrunken(self) -> bool:
        """Whether heads or units of some layers were removed."""
        left = {*self.heads_of_layers}, {*self.units_of_layers}
        return left != ({self.num_attention_heads}, {self.intermediate_size})


TINY = BertConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
)
SMALL = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
BASE = BertConfig()

TaskName = Literal[
    "squad",
    "cola",
    "sst2",
    "mrpc",
    "qqp",
    "stsb",
    "mnli",
    "qnli",
    "rte",
    "wnli",
    "file",
]
FROM_FILES = ("squad", "file")


@dataclass(frozen=True)
class TextDataConfig:
    """The text of a run.

    Attributes:
      name: squad, a task of GLUE, or file: labelled texts of your own.
      max_length: tokens in a row.
      stride: for squad, tokens that a part of a context shares with the next.
      question_limit: for squad, tokens kept of a question.
      examples: questions, or texts, to train on, a random choice that is the same for
        every seed; 0: all.
      evaluation_examples: the same for evaluation.
      validation: at least so many training questions or texts are held out, and
        evaluated in place of those for evaluation.
      batch_size: rows in a training step; the last partial batch is left out.
      evaluation_batch: rows in a batch of evaluation.
      text_columns: for file, the columns of the one or two texts.
      label_column: for file, the column of the label.
      labels: for file, the labels; by default those of the training file.
    """

    name: TaskName = "squad"
    max_length: int = 384
    stride: int = 128
    question_limit: int = 64
    examples: int = 0
    evaluation_examples: int = 0
    validation: int = 0
    batch_size: int = 16
    evaluation_batch: int = 64
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = typing.get_args(TaskName)
        check(self, "name", self.name in names, f"one of {', '.join(names)}")
        check_numbers(self)
        check_at_least(
            self, 1, "max_length", "question_limit", "batch_size", "evaluation_batch"
        )
        counts = ("stride", "examples", "evaluation_examples", "validation")
        check_at_least(self, 0, *counts)
        check(self, "text_columns", 1 <= len(self.text_columns) <= 2, "one or two")
        fits = self.name == "file" or not self.labels
        check(self, "labels", fits, f"left out for {self.name}")
        unique = len(set(self.labels))
        several = not self.labels or 1 < unique == len(self.labels)
        check(self, "labels", several, "at least two, each once")

    @property
    def asks_questions(self) -> bool:
        """Whether the answers are parts of a context, instead of labels."""
        return self.name == "squad"


@dataclass(frozen=True)
class BertModelConfig(BertConfig):
    """The shape of a BERT; it must be that of the weights, if a run starts from some.

    Attributes:
      dtype: of the computation; parameters, softmax and logits are float32.
    """

    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        dtypes = typing.get_args(Dtype)
        check(self, "dtype", self.dtype in dtypes, f"one of {', '.join(dtypes)}")

    @property
    def name(self) -> str:
        """Layers and features: ``bert-12x768``."""
        return f"bert-{self.num_hidden_layers}x{self.hidden_size}"

    @property
    def title(self) -> str:
        """Its name in tables and files."""
        return self.name

    @property
    def shape(self) -> BertConfig:
        """The fields that Hugging Face's config.json holds."""
        names = [field.name for field in dataclasses.fields(BertConfig)]
        return BertConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class TextConfig(RunConfig):
    """A run on text; it determines every number of the result.

    Attributes:
      data: the task and its rows.
      model: the network.
      train_file: for squad, the questions to train on, as the official JSON; by default
        those of tensorflow-datasets. For file, a CSV or JSONL file of labelled texts.
      eval_file: the same for evaluation.
      weights: the directory of a BERT in Hugging Face's form, to start from:
        config.json, model.safetensors or pytorch_model.bin, and the vocabulary. None:
        random initialisation; empty: required on the command line, unless ``init_from``
        is given.
      vocabulary: vocab.txt or tokenizer.json, or a directory with one; by default that
        of ``weights``.
      label_smoothing: share of the label spread over all classes, or over all tokens.
    """

    kind: ClassVar[str] = "text"

    name: str = "squad"
    data: TextDataConfig = field(default_factory=TextDataConfig)
    model: BertModelConfig = field(default_factory=BertModelConfig)
    train_file: str | None = None
    eval_file: str | None = None
    weights: str | None = None
    vocabulary: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.model.max_position_embeddings
        if self.data.max_length > limit:
            check(self.data, "max_length", False, f"at most {limit}, the positions")
        for name in ("train_file", "eval_file"):
            fits = getattr(self, name) is None or self.data.name in FROM_FILES
            check(self, name, fits, f"left out for {self.data.name}")

    @property
    def evaluated_on(self) -> dict[str, Any]:
        """See `RunConfig.evaluated_on`."""
        texts = ("text_columns", "label_column", "labels")
        names = ("name", "evaluation_examples", "validation", *texts)
        own = {name: getattr(self.data, name) for name in names}
        file = "train_file" if self.data.validation else "eval_file"
        return own | {file: getattr(self, file)}

    def check_inputs(self) -> None:
        """See `RunConfig.check_inputs`; also checks files of texts, and weights."""
        for name in ("train_file", "eval_file"):
            file = getattr(self, name)
            unread = name == "eval_file" and self.data.validation
            if file is None and self.data.name == "file" and not unread:
                flag = name.replace("_", "-")
                other = ", or hold texts out with --data.validation"
                raise ConfigError(
                    f"{self.name} reads labelled texts of your own: name a CSV or "
                    f"JSONL file with --{flag}{other * (name == 'eval_file')}"
                )
            if file is not None and not Path(file).exists():
                form = "; it should be SQuAD v1.1 JSON" * self.data.asks_questions
                raise DataError(f"{file} is missing{form}")
        if self.weights == "" and self.init_from is None:
            raise ConfigError(
                f"{self.name} starts from trained weights: name their directory with "
                f"--weights, or a run's with --init-from"
            )
