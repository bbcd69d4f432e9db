"""Runs on text."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from experiments.config.bert import BertConfig
from experiments.config.checks import check, check_at_least
from experiments.config.run import Dtype, RunConfig

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
]


@dataclass(frozen=True)
class TextDataConfig:
    """The text of a run.

    Attributes:
      name: squad, or a task of GLUE.
      max_length: tokens in a row.
      stride: of squad, tokens that a part of a context shares with the next.
      question_limit: of squad, tokens kept of a question.
      examples: questions, or texts, to train on, a random choice that is the same for
        every seed; 0: all.
      evaluation_examples: the same for evaluation.
      batch_size: rows in a training step; the last partial batch is left out.
      evaluation_batch: rows in a batch of evaluation.
    """

    name: TaskName = "squad"
    max_length: int = 384
    stride: int = 128
    question_limit: int = 64
    examples: int = 0
    evaluation_examples: int = 0
    batch_size: int = 16
    evaluation_batch: int = 64

    def __post_init__(self) -> None:
        names = typing.get_args(TaskName)
        check(self, "name", self.name in names, f"one of {', '.join(names)}")
        check_at_least(
            self, 1, "max_length", "question_limit", "batch_size", "evaluation_batch"
        )
        check_at_least(self, 0, "stride", "examples", "evaluation_examples")


@dataclass(frozen=True)
class BertModelConfig(BertConfig):
    """The shape of a BERT, that of the weights where a run starts from some.

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
    def shape(self) -> BertConfig:
        """What Hugging Face's config.json says of it."""
        names = [field.name for field in dataclasses.fields(BertConfig)]
        return BertConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class TextConfig(RunConfig):
    """A run on text; with its seed it determines every number of the result.

    Attributes:
      data: the task and its rows.
      model: the network.
      train_file: of squad, the questions to train on, as the official JSON; by default
        those of tensorflow-datasets.
      eval_file: of squad, the questions to judge on.
      weights: a directory as Hugging Face stores a BERT, to start from: config.json,
        model.safetensors or pytorch_model.bin, and the vocabulary. None: the initial
        weights of the seed; empty: has to be named to train, unless ``init_from`` is.
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
            fits = getattr(self, name) is None or self.data.name == "squad"
            check(self, name, fits, f"left out for {self.data.name}")
