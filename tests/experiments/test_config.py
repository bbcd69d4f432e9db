import json

import jax
import pytest

import cram_jax
from experiments.compression.targets import label, projector, sparsity
from experiments.config import OptimizerConfig, variant
from experiments.errors import ConfigError
from experiments.images.config import DataConfig, ImageConfig, ModelConfig
from experiments.recipes import IMAGE_RECIPES
from experiments.runs.stored_config import differences, from_dict, to_dict


@pytest.mark.parametrize("config", IMAGE_RECIPES.values(), ids=IMAGE_RECIPES)
def test_a_configuration_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageConfig(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: ImageConfig(seed=-1), "seed must be at least 0, got -1"),
        (lambda: ImageConfig(label_smoothing=1.0), "label_smoothing must be"),
        (lambda: ImageConfig(eval_targets=("k90", "half")), "target 'half' is unknown"),
        (lambda: DataConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: DataConfig(shift=-1), "shift must be at least 0, got -1"),
        (lambda: ModelConfig(widths=()), "widths must be"),
        (lambda: ModelConfig(widths=(4, 8), blocks=(1,)), "blocks must be one a stage"),
        (lambda: OptimizerConfig(rule="adam"), "rule must be one of none, sam"),
        (lambda: OptimizerConfig(rho=-0.1), "rho must be at least 0, got -0.1"),
        (lambda: OptimizerConfig(masks_every=0), "masks_every must be at least 1"),
        (lambda: OptimizerConfig(train_targets=("u100",)), "target 'u100': sparsity"),
        (lambda: OptimizerConfig(subsample=0), "subsample must be at least 1, got 0"),
        (lambda: OptimizerConfig(batch_share=0), "batch_share must be above 0 and"),
        (
            lambda: OptimizerConfig(rule="none", batch_share=0.5),
            "batch_share must be 1 for rule none, got 0.5",
        ),
        (
            lambda: ImageConfig(
                optimizer=OptimizerConfig(rule="gradual", train_targets=("k90",)),
                evaluate_every=1,
                patience=1,
            ),
            "patience must be 0 for rule gradual, whose last model",
        ),
        (lambda: ModelConfig(patch=0), "patch must be at least 1, got 0"),
        (lambda: OptimizerConfig(momentum=1.0), "momentum must be"),
        (
            lambda: OptimizerConfig(train_targets=()),
            "train_targets must be at least one",
        ),
        (lambda: OptimizerConfig(train_targets=("k100",)), "target 'k100': sparsity"),
        (lambda: OptimizerConfig(train_targets=("5:4",)), "target '5:4': n must"),
        (lambda: OptimizerConfig(train_targets=("1bit",)), "target '1bit': bits"),
        (lambda: from_dict({"epoch": 3}), "ImageConfig has no 'epoch'"),
        (lambda: from_dict({"data": {"batch": 3}}), "DataConfig has no 'batch'"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_differences_are_named_by_their_path():
    other = ImageConfig(epochs=3, optimizer=OptimizerConfig(rho=0.5))
    assert differences(other, ImageConfig()) == {"optimizer.rho": 0.5, "epochs": 3}


@pytest.mark.parametrize(
    ("target", "projector_label", "text", "share"),
    [
        ("dense", "identity()", "dense", 0.0),
        ("k90", "top_k(0.9)", "90 %", 0.9),
        ("k97.5", "top_k(0.975)", "97.5 %", 0.975),
        ("k7", "top_k(0.07)", "7 %", 0.07),
        (
            "u90",
            "top_k(0.9, scope='layer')",
            "90 % uniform",
            None,
        ),
        ("2:4", "n_m(2, 4)", "2:4", None),
        ("4bit", "fake_quant(4)", "4-bit", None),
        (
            "4bit@32",
            "fake_quant(4, block=32, scale='float16')",
            "4-bit by 32",
            None,
        ),
        (
            "4bit@32bf16",
            "fake_quant(4, block=32, scale='bfloat16')",
            "4-bit by 32 bfloat16",
            None,
        ),
        ("nested4", "nested(4)", "4 of 8 bits", None),
        ("mxfp4", "mxfp4()", "MXFP4", None),
        ("k90+nvfp4", "compose(top_k(0.9), nvfp4())", "90 % + NVFP4", None),
        (
            "k90+4bit",
            "compose(top_k(0.9), fake_quant(4))",
            "90 % + 4-bit",
            None,
        ),
    ],
)
def test_targets_read_as_the_paper_writes_them(target, projector_label, text, share):
    assert repr(projector(target)) == projector_label
    assert label(target) == text
    assert sparsity(target) == share


def test_masks_can_serve_for_many_steps_but_not_levels():
    assert repr(projector("k90+4bit", masks_every=20)) == (
        "compose(cached(top_k(0.9), every=20), fake_quant(4))"
    )


def test_uniform_sparsity_is_of_a_scope_of_its_own():
    assert sparsity("u90", "layer") == 0.9
    assert sparsity("k90", "layer") is None
    assert sparsity("dense", "layer") == 0.0


def test_channels_of_all_layers_compete(config, task):
    params, _ = task.init(0)
    pruner = projector("c50", filters=task.filters)
    assert pruner == projector("c50", filters=task.filters)
    assert label("c50+4bit") == "50 % of channels + 4-bit"
    assert sparsity("c50", "channels") == 0.5
    _, masks = cram_jax.compress(params, pruner)
    scales = [
        masks["stem"]["norm"]["scale"],
        masks["stage1_block1"]["norm1"]["scale"],
        masks["stage2_block1"]["norm1"]["scale"],
        masks["stage2_block1"]["norm2"]["scale"],
    ]
    assert sum(int(scale.sum()) for scale in scales) == (4 + 4 + 8 + 8) // 2
    with pytest.raises(ConfigError, match="which channels belong together is not"):
        projector("c50")


def test_uniform_pruning_leaves_the_first_and_the_last_layer_dense(config, task):
    params, _ = task.init(0)
    _, masks = cram_jax.compress(params, projector("u50", filters=task.filters))
    shares = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(mask.mean())
        for path, mask in jax.tree.leaves_with_path(masks)
        if mask.ndim > 1
    }
    dense = {path for path, share in shares.items() if share == 1}
    assert dense == {"stem/conv/kernel", "head/kernel"}
    assert {share for path, share in shares.items() if path not in dense} == {0.5}


def test_a_variant_differs_in_what_is_named():
    other = variant(ImageConfig(), "other", epochs=3, eval_targets=("dense",), rho=0.5)
    assert differences(other, ImageConfig()) == {
        "name": "other",
        "optimizer.rho": 0.5,
        "epochs": 3,
        "eval_targets": ("dense",),
    }
