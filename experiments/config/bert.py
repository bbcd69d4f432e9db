"""The shape of a BERT, checked, and the sizes people use."""

import dataclasses

from experiments.errors import ConfigError


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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ConfigError(
                    f"{field.name} must be a positive integer, got {value!r}"
                )
            is_rate = field.name.endswith(("dropout_prob", "classifier_dropout"))
            if is_rate and value is not None and not 0 <= value < 1:
                raise ConfigError(f"{field.name} must be in [0, 1), got {value!r}")
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


TINY = BertConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
)
SMALL = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
BASE = BertConfig()
LARGE = BertConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)
