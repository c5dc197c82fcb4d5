"""Between `ModelConfig` and the `config.json` of Hugging Face, both ways: files of JSON, dicts."""

import json
import math
from pathlib import Path

# What transformers assumes for a key that a Gemma 3 config.json leaves out.
_HF_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
}


def read_json(path: Path) -> dict:
    """Read a JSON object; raises ValueError naming the file when it is missing or malformed."""
    if not path.is_file():
        raise ValueError(
            f"{path}: file must exist, got nothing there; point --model at a Hugging Face "
            "model folder (config.json, *.safetensors, tokenizer.model)"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be JSON, got {error}; download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}; repair it")
    return value


def read_fields(hf: dict) -> dict:
    """Return the fields of a `ModelConfig` from a `config.json` (old or new style, text-only or
    multimodal).

    Raises ValueError for another architecture or for options Gemma 3 text does not have.
    """
    text = _dict_at(hf, "text_config") or hf
    kind = text.get("model_type", hf.get("model_type"))
    if kind not in ("gemma3", "gemma3_text"):
        raise ValueError(
            f"config.json: model_type must be 'gemma3' or 'gemma3_text', got {kind!r}; "
            "point --model at a Gemma 3 checkpoint"
        )
    get = {**_HF_DEFAULTS, **{k: v for k, v in text.items() if v is not None}}.__getitem__
    for key in _HF_DEFAULTS:
        kinds = (int, float) if key in ("query_pre_attn_scalar", "rms_norm_eps") else (int,)
        if type(get(key)) not in kinds or not 0 < get(key) < math.inf:
            raise ValueError(
                f"config.json: {key} must be a number above 0, got {get(key)!r}; repair config.json"
            )
    rope_local, rope_global, rope_scale = _read_rope(text)
    num_layers = get("num_hidden_layers")
    _check_kind(text, hf)
    if get("num_attention_heads") % get("num_key_value_heads"):
        raise ValueError(
            f"config.json: num_attention_heads {get('num_attention_heads')} must be divisible "
            f"by num_key_value_heads {get('num_key_value_heads')}; repair config.json"
        )
    return dict(
        num_layers=num_layers,
        embed_dim=get("hidden_size"),
        num_heads=get("num_attention_heads"),
        num_kv_heads=get("num_key_value_heads"),
        head_dim=get("head_dim"),
        mlp_dim=get("intermediate_size"),
        vocab_size=get("vocab_size"),
        window=get("sliding_window"),
        global_layers=_read_layer_types(text, num_layers),
        query_scalar=float(get("query_pre_attn_scalar")),
        rope_base_local=rope_local,
        rope_base_global=rope_global,
        rope_scale_global=rope_scale,
        norm_eps=get("rms_norm_eps"),
        max_positions=get("max_position_embeddings"),
    )


def _check_kind(text: dict, hf: dict) -> None:
    """Raise ValueError for an option that Gemma 3 text does not have."""
    activation = text.get("hidden_activation") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise ValueError(
            "config.json: hidden_activation must be 'gelu_pytorch_tanh', which Gemma 3 has, got "
            f"{activation!r}; use a Gemma 3 checkpoint"
        )
    if text.get("final_logit_softcapping") or text.get("attn_logit_softcapping"):
        raise ValueError(
            "config.json: Gemma 3 has no logit soft-cap, got one; "
            "this looks like a Gemma 2 checkpoint, use a Gemma 3 one"
        )
    if not text.get("tie_word_embeddings", hf.get("tie_word_embeddings", True)):
        raise ValueError(
            "config.json: tie_word_embeddings must be true (Gemma 3 shares embedding and "
            "unembedding), got false; use a checkpoint with tied embeddings"
        )
    if text.get("use_bidirectional_attention"):
        raise ValueError(
            "config.json: use_bidirectional_attention must be false (each token sees the past "
            "only), got true; use a Gemma 3 language model, not EmbeddingGemma"
        )


def write_fields(cfg) -> dict:
    """Return the `config.json` of a `ModelConfig` that transformers reads, with old- and new-style
    keys both."""
    kinds = ["full_attention" if g else "sliding_attention" for g in cfg.global_layers]
    scaled = cfg.rope_scale_global != 1.0
    linear = {"rope_type": "linear", "factor": cfg.rope_scale_global}
    rope_global = {"rope_theta": cfg.rope_base_global} | (
        linear if scaled else {"rope_type": "default"}
    )
    pattern = _pattern_of(cfg.global_layers)
    scalar = float(cfg.query_scalar)  # transformers reads an int only
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.embed_dim,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.mlp_dim,
        "vocab_size": cfg.vocab_size,
        "sliding_window": cfg.window,
        "layer_types": kinds,
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "rope_local_base_freq": cfg.rope_base_local,
        "rope_theta": cfg.rope_base_global,
        "rope_scaling": linear if scaled else None,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": cfg.rope_base_local,
            },
            "full_attention": rope_global,
        },
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": [1, 106],
        "bos_token_id": 2,
    } | ({"sliding_window_pattern": pattern} if pattern else {})


def _read_layer_types(text: dict, num_layers: int) -> tuple[bool, ...]:
    """Per layer, is it global? New files list `layer_types`, older ones give a pattern."""
    if text.get("layer_types"):
        kinds = text["layer_types"]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ValueError(
                f"config.json: layer_types must have num_hidden_layers = {num_layers} entries, "
                f"got {len(kinds) if isinstance(kinds, list) else kinds!r}; repair config.json"
            )
        unknown = [x for x in kinds if x not in ("full_attention", "sliding_attention")]
        if unknown:
            raise ValueError(
                "config.json: layer_types must be full_attention or sliding_attention, got "
                f"{unknown[0]!r}; use a Gemma 3 checkpoint"
            )
        return tuple(kind == "full_attention" for kind in kinds)
    pattern = text.get("sliding_window_pattern", text.get("_sliding_window_pattern")) or 6
    if type(pattern) is not int or pattern < 1:
        raise ValueError(
            f"config.json: sliding_window_pattern must be an integer above 0, got {pattern!r}; "
            "repair config.json"
        )
    return five_to_one(num_layers, pattern)


def _read_rope(text: dict) -> tuple[float, float, float]:
    """Return (local base, global base, global scale) from old, new, or mixed config.json."""
    new = _dict_at(text, "rope_parameters")
    near = _dict_at(new, "sliding_attention")
    wide = _dict_at(new, "full_attention") | _dict_at(text, "rope_scaling")
    base_global = wide.get("rope_theta") or text.get("rope_theta") or 1_000_000.0
    base_local = near.get("rope_theta") or text.get("rope_local_base_freq") or 10_000.0
    kind = wide.get("rope_type", wide.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(
            f"config.json: RoPE scaling must be 'default' or 'linear', got {kind!r}; "
            "only Gemma 3's own scaling is supported"
        )
    scale = wide.get("factor", 1.0) if kind == "linear" else 1.0
    local = near.get("rope_type", near.get("type", "default"))
    if local != "default":
        raise ValueError(
            f"config.json: RoPE of sliding_attention must be 'default', got {local!r}; only Gemma "
            "3's own scaling is supported"
        )
    for name, value in (("local base", base_local), ("base", base_global), ("factor", scale)):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(
                f"config.json: RoPE's {name} must be a number above 0, got {value!r}; repair "
                "config.json"
            )
    return float(base_local), float(base_global), float(scale)


def _dict_at(outer: dict, key: str) -> dict:
    """Return the object at a key, {} where there is none."""
    value = outer.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"config.json: {key} must be an object, got {value!r}; repair config.json")
    return value


def five_to_one(num_layers: int, pattern: int = 6) -> tuple[bool, ...]:
    """Gemma 3's layer plan: every `pattern`-th layer is global, the others are local."""
    return tuple((i + 1) % pattern == 0 for i in range(num_layers))


def _pattern_of(global_layers: tuple[bool, ...]) -> int | None:
    """Return the pattern that `five_to_one` would need, or None for an irregular plan."""
    length = len(global_layers)
    return next((p for p in range(1, length + 1) if five_to_one(length, p) == global_layers), None)
