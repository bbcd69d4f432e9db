"""What a run is: frozen dataclasses, checked when they are made."""

from experiments.config.bert import BertConfig
from experiments.config.images import Config, DataConfig, ModelConfig, ModelName
from experiments.config.optimizer import Base, Method, OptimizerConfig, Schedule
from experiments.config.run import Dtype, RunConfig, variant
from experiments.config.stored import differences, from_dict, to_dict
from experiments.config.text import BertModelConfig, TextConfig, TextDataConfig

__all__ = [
    "Base",
    "BertConfig",
    "BertModelConfig",
    "Config",
    "DataConfig",
    "Dtype",
    "Method",
    "ModelConfig",
    "ModelName",
    "OptimizerConfig",
    "RunConfig",
    "Schedule",
    "TextConfig",
    "TextDataConfig",
    "differences",
    "from_dict",
    "to_dict",
    "variant",
]
