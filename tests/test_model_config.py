"""config.json in every style that Gemma 3 checkpoints come in, and back."""

import dataclasses
import json

import pytest

from gemma_cot.config import (
    GEMMA3_1B,
    GEMMA3_4B,
    GEMMA3_12B,
    GEMMA3_27B,
    GEMMA3_270M,
    TINY,
    ModelConfig,
    five_to_one,
)
from gemma_cot.model.params import num_params

FAMILY = {
    "270M": GEMMA3_270M,
    "1B": GEMMA3_1B,
    "4B": GEMMA3_4B,
    "12B": GEMMA3_12B,
    "27B": GEMMA3_27B,
    "tiny": TINY,
}

# google/gemma-3-1b-it as first published: old style, text only.
OLD_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
# The same written by transformers 5: rope_parameters and layer_types instead.
NEW_1B = {
    k: v for k, v in OLD_1B.items() if not k.startswith("rope") and "window_pattern" not in k
} | {
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_theta": 1000000, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
    },
}
# google/gemma-3-4b-it: multimodal, the text tower nested, and most keys left to the defaults.
OLD_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}


def refused(match: str, **changes):
    """Assert that the 1B file with `changes` raises a ValueError that matches."""
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_hf(OLD_1B | changes)
    return True


def test_old_style_text_only_file():
    assert ModelConfig.from_hf(OLD_1B) == GEMMA3_1B


def test_new_style_file():
    assert ModelConfig.from_hf(NEW_1B) == GEMMA3_1B


def test_multimodal_file_with_defaults():
    assert ModelConfig.from_hf(OLD_4B) == GEMMA3_4B


def test_multimodal_files_of_12b_and_27b():
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    twelve = dict(hidden_size=3840, intermediate_size=15360, num_attention_heads=16)
    twelve |= dict(num_hidden_layers=48, num_key_value_heads=8) | scaling
    large = dict(hidden_size=5376, intermediate_size=21504, num_attention_heads=32, head_dim=128)
    large |= dict(num_hidden_layers=62, num_key_value_heads=16, query_pre_attn_scalar=168)
    for text, expected in ((twelve, GEMMA3_12B), (large | scaling, GEMMA3_27B)):
        assert ModelConfig.from_hf({"model_type": "gemma3", "text_config": text}) == expected


def test_270m_file_with_underscored_pattern():
    text = OLD_1B | dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18)
    text["_sliding_window_pattern"] = text.pop("sliding_window_pattern")
    assert ModelConfig.from_hf(text) == GEMMA3_270M
    third = ModelConfig.from_hf(text | {"_sliding_window_pattern": 3})
    assert third == dataclasses.replace(GEMMA3_270M, global_layers=(False, False, True) * 6)


def test_a_file_without_its_window_has_that_of_transformers():
    bare = {key: value for key, value in OLD_1B.items() if key != "sliding_window"}
    assert ModelConfig.from_hf(bare) == dataclasses.replace(GEMMA3_1B, window=4096)


def test_new_style_linear_scaling_concerns_global_layers():
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    cfg = ModelConfig.from_hf(NEW_1B | {"rope_parameters": rope})
    assert cfg == dataclasses.replace(GEMMA3_1B, rope_scale_global=8.0)


def test_old_style_scaling_under_its_oldest_key():
    cfg = ModelConfig.from_hf(OLD_1B | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert cfg.rope_scale_global == 4.0


def test_mixed_style_takes_what_rope_parameters_leave_out_from_the_flat_keys():
    """As transformers reads it: rope_parameters first, then rope_theta and rope_local_base_freq."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default"},
    }
    mixed = NEW_1B | {"rope_parameters": rope, "rope_theta": 5e5, "rope_local_base_freq": 2e3}
    cfg = ModelConfig.from_hf(mixed)
    changes = dict(rope_base_global=5e5, rope_base_local=2e3, rope_scale_global=8.0)
    assert cfg == dataclasses.replace(GEMMA3_1B, **changes)


@pytest.mark.parametrize("name", FAMILY)
def test_round_trip_through_json(name):
    text = json.dumps(FAMILY[name].to_hf())
    assert ModelConfig.from_hf(json.loads(text)) == FAMILY[name]


@pytest.mark.parametrize("dropped", ["old", "new"])
def test_either_style_alone_is_enough_to_read_back(dropped):
    """to_hf writes both styles, so that older and newer transformers read the same model."""
    old = {"rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"}
    gone = old if dropped == "old" else {"rope_parameters", "layer_types"}
    left = {k: v for k, v in GEMMA3_4B.to_hf().items() if k not in gone}
    assert len(left) == len(GEMMA3_4B.to_hf()) - len(gone)
    assert ModelConfig.from_hf(left) == GEMMA3_4B


def test_round_trip_of_an_irregular_layer_plan():
    odd = dataclasses.replace(GEMMA3_270M, global_layers=(True, False) * 9)
    assert "sliding_window_pattern" not in odd.to_hf()  # no pattern tells this plan
    assert ModelConfig.from_hf(odd.to_hf()) == odd


def test_layer_plan_is_five_local_one_global():
    assert five_to_one(8) == (False, False, False, False, False, True, False, False)
    # 26 // 6 = 4 global layers: 5, 11, 17, 23 counted from 0
    assert [i for i, g in enumerate(GEMMA3_1B.global_layers) if g] == [5, 11, 17, 23]


def test_parameter_counts():
    """Embedding V·D, final norm D, and L times: 4 D + 2 H + 2 D·N·H + 2 D·K·H + 3 D·F.

    1B: 262144·1152 + 1152 + 26·(4608 + 512 + 2·1152·1024 + 2·1152·256 + 3·1152·6912).
    270M: 262144·640 + 640 + 18·(2560 + 512 + 2·640·1024 + 2·640·256 + 3·640·2048).
    """
    assert num_params(GEMMA3_1B) == 301_989_888 + 1152 + 26 * 26_842_112 == 999_885_952
    assert num_params(GEMMA3_270M) == 167_772_160 + 640 + 18 * 5_573_632 == 268_098_176


def test_config_is_hashable_and_has_a_size_per_letter(cfg):
    assert hash(cfg) == hash(dataclasses.replace(cfg))
    assert cfg.sizes == dict(L=3, D=20, N=6, K=2, Q=3, H=8, F=28, V=50)


@pytest.mark.parametrize("kind", ["gemma2", "llama", None])
def test_another_architecture_is_refused(kind):
    assert refused("model_type must be 'gemma3' or 'gemma3_text', got", model_type=kind)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_soft_cap_is_refused(key):
    assert refused("no logit soft-cap", **{key: 30.0})


def test_bidirectional_attention_is_refused():
    assert refused("use_bidirectional_attention must be", use_bidirectional_attention=True)


def test_untied_embedding_is_refused():
    assert refused("tie_word_embeddings must be true", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings must be true"):
        ModelConfig.from_hf(OLD_4B | {"tie_word_embeddings": False})


def test_head_counts_that_do_not_divide_are_refused():
    assert refused("num_attention_heads 4 must be divisible.* 3", num_key_value_heads=3)


def test_an_unknown_kind_of_layer_is_refused():
    kinds = ["sliding_attention", "chunked_attention"] * 13
    assert refused("must be full_attention or sliding_attention, got 'chunked", layer_types=kinds)


def test_wrong_number_of_layer_types_is_refused():
    assert refused("must have num_hidden_layers = 26 entries, got 1", layer_types=["x"])


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_other_rope_scaling_is_refused(kind):
    assert refused("'default' or 'linear', got", rope_scaling={"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_rope_scaling_of_local_layers_is_refused(kind):
    near = {"sliding_attention": {"rope_type": kind, "factor": 4.0}}
    assert refused(f"RoPE of sliding_attention must be 'default', got '{kind}'",
                   rope_parameters=near)  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": 0}, {"hidden_size": "a"}, {"vocab_size": 3.5}]
)
def test_sizes_that_are_no_sizes_are_refused(change):
    (key,) = change
    with pytest.raises(ValueError, match=f"config.json: {key} must be a number above 0, got"):
        ModelConfig.from_hf(OLD_1B | change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation must be 'gelu_pytorch_tanh'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "RoPE's factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "RoPE's factor must be a number"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_theta": -1}, "RoPE's base must be a number above 0, got -1"),
        ({"rope_local_base_freq": "a"}, "RoPE's local base must be a number"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"full_attention": 5}}, "full_attention must be an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0, got nan"),
        ({"sliding_window_pattern": -3}, "sliding_window_pattern must be an integer above 0"),
        ({"sliding_window_pattern": "6"}, "sliding_window_pattern must be an integer above 0"),
        ({"layer_types": [1] * 26}, "must be full_attention or sliding_attention, got 1"),
        ({"layer_types": 5}, "must have num_hidden_layers = 26 entries, got 5"),
        ({"text_config": [1]}, "text_config must be an object"),
    ],
)
def test_what_gemma_3_cannot_be_is_refused(change, match):
    assert refused(f"config.json: .*{match}", **change)


def test_an_empty_text_config_is_none():
    assert ModelConfig.from_hf(OLD_1B | {"text_config": None}) == GEMMA3_1B
