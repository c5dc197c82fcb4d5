"""Every setting of the program, in one place: model shapes, the run's settings, presets, flags.

A flag's default and help text are the dataclass field below and nothing else; a preset is a dict
of overrides. Precision, in one paragraph: base weights and activations are float32 on a CPU and
bfloat16 on accelerators (`--dtype`); norms, softmax, log-softmax, LoRA adapters, gradients and
optimiser state are float32 everywhere; tests run in float32. No function hard-codes a dtype for
weights or activations.
"""

import dataclasses
from dataclasses import dataclass, field
from importlib import resources

from absl import flags

# --------------------------------------------------------------------------------------------
# Model shapes
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Gemma 3 text tower. Hashable: a static argument of every jitted function."""

    num_layers: int  # L
    embed_dim: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    mlp_dim: int  # F
    vocab_size: int  # V
    window: int  # positions a local layer sees, self included
    global_layers: tuple[bool, ...]  # per layer: True sees everything, False sees `window`
    query_scalar: float = 256.0  # queries are multiplied by query_scalar ** -0.5
    rope_base_local: float = 10_000.0
    rope_base_global: float = 1_000_000.0
    rope_scale_global: float = 1.0  # positions are divided by this in global layers (8 from 4B)
    norm_eps: float = 1e-6
    max_positions: int = 32_768

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size, for `axes.shape_of`."""
        return {
            "L": self.num_layers,
            "D": self.embed_dim,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "Q": self.num_heads // self.num_kv_heads,
            "H": self.head_dim,
            "F": self.mlp_dim,
            "V": self.vocab_size,
        }

    @staticmethod
    def from_hf(hf: dict) -> "ModelConfig":
        """Read a Hugging Face `config.json` (old or new style, text-only or multimodal).

        Raises ValueError for another architecture or for options Gemma 3 text does not have.
        """
        text = hf.get("text_config", hf)
        kind = text.get("model_type", hf.get("model_type"))
        if kind not in ("gemma3", "gemma3_text"):
            raise ValueError(
                f"config.json: model_type must be 'gemma3' or 'gemma3_text', got {kind!r}; "
                "point --model at a Gemma 3 checkpoint"
            )
        get = {**_HF_DEFAULTS, **{k: v for k, v in text.items() if v is not None}}.__getitem__
        rope_local, rope_global, rope_scale = _read_rope(text)
        num_layers = get("num_hidden_layers")
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
        if get("num_attention_heads") % get("num_key_value_heads"):
            raise ValueError(
                f"config.json: num_attention_heads {get('num_attention_heads')} must be divisible "
                f"by num_key_value_heads {get('num_key_value_heads')}; repair config.json"
            )
        return ModelConfig(
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

    def to_hf(self) -> dict:
        """Write the `config.json` that transformers reads, with old- and new-style keys both."""
        kinds = ["full_attention" if g else "sliding_attention" for g in self.global_layers]
        scaled = self.rope_scale_global != 1.0
        linear = {"rope_type": "linear", "factor": self.rope_scale_global}
        rope_global = {"rope_theta": self.rope_base_global} | (
            linear if scaled else {"rope_type": "default"}
        )
        pattern = _pattern_of(self.global_layers)
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.embed_dim,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_dim,
            "vocab_size": self.vocab_size,
            "sliding_window": self.window,
            "layer_types": kinds,
            "query_pre_attn_scalar": self.query_scalar,
            "rope_local_base_freq": self.rope_base_local,
            "rope_theta": self.rope_base_global,
            "rope_scaling": linear if scaled else None,
            "rope_parameters": {
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": self.rope_base_local,
                },
                "full_attention": rope_global,
            },
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_positions,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": [1, 106],
            "bos_token_id": 2,
        } | ({"sliding_window_pattern": pattern} if pattern else {})


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


def _read_layer_types(text: dict, num_layers: int) -> tuple[bool, ...]:
    """Per layer, is it global? New files list `layer_types`, older ones give a pattern."""
    if text.get("layer_types"):
        kinds = text["layer_types"]
        if len(kinds) != num_layers:
            raise ValueError(
                f"config.json: layer_types must have num_hidden_layers = {num_layers} entries, "
                f"got {len(kinds)}; repair config.json"
            )
        return tuple(kind == "full_attention" for kind in kinds)
    pattern = text.get("sliding_window_pattern", text.get("_sliding_window_pattern")) or 6
    return five_to_one(num_layers, pattern)


def _read_rope(text: dict) -> tuple[float, float, float]:
    """Return (local base, global base, global scale) from either style of config.json."""
    new = text.get("rope_parameters") or {}
    if "full_attention" in new:
        wide, near = new["full_attention"], new.get("sliding_attention", {})
        scaling = wide
        base_global = wide.get("rope_theta", 1_000_000.0)
        base_local = near.get("rope_theta", 10_000.0)
    else:
        scaling = text.get("rope_scaling") or {}
        base_global = text.get("rope_theta", 1_000_000.0)
        base_local = text.get("rope_local_base_freq", 10_000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(
            f"config.json: RoPE scaling must be 'default' or 'linear', got {kind!r}; "
            "only Gemma 3's own scaling is supported"
        )
    scale = float(scaling.get("factor", 1.0)) if kind == "linear" else 1.0
    return float(base_local), float(base_global), scale


def five_to_one(num_layers: int, pattern: int = 6) -> tuple[bool, ...]:
    """Gemma 3's layer plan: every `pattern`-th layer is global, the others are local."""
    return tuple((i + 1) % pattern == 0 for i in range(num_layers))


def _pattern_of(global_layers: tuple[bool, ...]) -> int | None:
    """Return the pattern that `five_to_one` would need, or None for an irregular plan."""
    length = len(global_layers)
    return next((p for p in range(1, length + 1) if five_to_one(length, p) == global_layers), None)


def _gemma3(L: int, D: int, N: int, K: int, H: int, F: int, **rest) -> ModelConfig:
    return ModelConfig(L, D, N, K, H, F, global_layers=five_to_one(L), **rest)


_LARGE = dict(vocab_size=262_208, window=1024, rope_scale_global=8.0, max_positions=131_072)
GEMMA3_270M = _gemma3(18, 640, 4, 1, 256, 2048, vocab_size=262_144, window=512)
GEMMA3_1B = _gemma3(26, 1152, 4, 1, 256, 6912, vocab_size=262_144, window=512)
GEMMA3_4B = _gemma3(34, 2560, 8, 4, 256, 10_240, **_LARGE)
GEMMA3_12B = _gemma3(48, 3840, 16, 8, 256, 15_360, **_LARGE)
GEMMA3_27B = _gemma3(62, 5376, 32, 16, 128, 21_504, query_scalar=168.0, **_LARGE)
# The embedded model: 6 layers so that one of them is global, as in the real family.
TINY = _gemma3(6, 128, 4, 1, 32, 384, query_scalar=32.0, vocab_size=768, window=512)
