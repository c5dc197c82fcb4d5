"""Gemma 3 here is Gemma 3 in transformers: logits, gradients, files both ways, greedy tokens.

Run with the packages of the extra `interop`: pytest -m interop tests/interop -s (prints maxima).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.config import GEMMA3_1B, GEMMA3_4B, TINY
from gemma_cot.model.gemma import logits
from gemma_cot.model.load import load_pretrained, save_pretrained, stored_tensors
from gemma_cot.model.logprob import token_logprobs
from gemma_cot.model.params import init_params
from gemma_cot.model.sample import sample

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

# Logits of size 1 to 5; both sides sum in float32 in different orders over a few layers. Measured
# below 1e-5. A wrong window, RoPE base or query scale moves them by more than 0.01.
LOGIT_ATOL = 1e-4
# Of each tensor's largest gradient entry: the same rounding, through the backward pass too.
# Measured below 1e-5. A query scale 1 % off moves some gradient by 2 % or more in every case.
GRAD_RTOL = 1e-3


def rope(local=10_000.0, wide=1_000_000.0, factor=None):
    scaling = {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
        "full_attention": {**scaling, "rope_theta": wide},
    }


# Changes of conftest.SMALL; None = the key is left out and transformers' default holds.
CASES = {
    "three_layers": {},
    "one_kv_head_pattern_6": dict(
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        hidden_size=40,
        sliding_window=7,
        layer_types=None,
        rope_parameters=None,
        query_pre_attn_scalar=16,
    ),
    "as_many_kv_heads": dict(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        hidden_size=36,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "large_heads_scale_8": dict(
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=11,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=rope(500.0, 20_000.0, 8.0),
        query_pre_attn_scalar=21,
        rms_norm_eps=1e-4,
    ),
    "all_local": dict(layer_types=["sliding_attention"] * 3, sliding_window=4),
    "all_global": dict(layer_types=["full_attention"] * 3, rope_parameters=rope(factor=4.0)),
    "window_1": dict(sliding_window=1),
}


def ours_of(model, folder):
    """Return (cfg, float32 params) read from what transformers saves of `model`."""
    model.save_pretrained(folder)
    return load_pretrained(folder, "float32")


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient(case, make_gemma, their_logits, padded_tokens, tmp_path):
    """24 columns, longer than every window; rows that start at columns 0, 5 and 17."""
    model = make_gemma(seed=1, **CASES[case])
    cfg, params = ours_of(model, tmp_path)
    tokens, start, real = padded_tokens(cfg.vocab_size)
    predicted = real & (np.arange(24)[None, :] > start[:, None])  # targets with a token before

    theirs = their_logits(model, tokens, start)
    logp = torch.log_softmax(theirs[:, :-1].double(), -1)
    chosen = logp.gather(-1, torch.tensor(tokens[:, 1:], dtype=torch.long)[..., None])[..., 0]
    their_loss = -chosen[torch.tensor(predicted[:, 1:])].mean()
    their_loss.backward()
    their_grads = {name: weight.grad.numpy() for name, weight in model.named_parameters()}

    def loss(params):
        logp_BT = token_logprobs(params, cfg, tokens, start)
        return -jnp.sum(jnp.where(predicted, logp_BT, 0.0)) / float(predicted.sum())

    ours = jax.jit(logits, static_argnames="cfg")(params, cfg, tokens, start)
    our_loss, grads = jax.jit(jax.value_and_grad(loss))(params)
    our_grads = dict(stored_tensors(cfg, grads))

    off = np.abs(np.asarray(ours) - theirs.detach().numpy())[real].max()
    size = np.abs(theirs.detach().numpy())[real].max()
    assert our_grads.keys() == their_grads.keys()
    errors = {
        name: np.abs(our_grads[name] - grad).max() / max(np.abs(grad).max(), 1e-6)
        for name, grad in their_grads.items()
    }
    worst = max(errors, key=errors.get)
    print(f"\n{case}: logits {off:.1e} of {size:.1f}, gradients {errors[worst]:.1e} ({worst})")
    assert off < LOGIT_ATOL
    assert abs(float(our_loss) - their_loss.item()) < 1e-5  # a mean of about 20 values near 5
    assert errors[worst] < GRAD_RTOL, worst


def test_the_window_matters_at_these_lengths(make_gemma, padded_tokens, tmp_path):
    """Guards the test above: one position more or fewer in the window would not pass it."""
    cfg, params = ours_of(make_gemma(seed=1), tmp_path)
    tokens, start, real = padded_tokens(cfg.vocab_size)
    run = jax.jit(logits, static_argnames="cfg")
    base = run(params, cfg, tokens, start)
    for window in (cfg.window - 1, cfg.window + 1):
        other = run(params, cfg.__class__(**{**cfg.__dict__, "window": window}), tokens, start)
        assert np.abs(other - base)[real].max() > 100 * LOGIT_ATOL


# ---- config.json --------------------------------------------------------------------------------

OLD_STYLE = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 9,
    "rope_theta": 300_000,
    "rope_local_base_freq": 2_000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "torch_dtype": "float32",
}
NEW_STYLE = {
    key: value
    for key, value in OLD_STYLE.items()
    if not key.startswith("rope_") and key not in ("sliding_window_pattern", "torch_dtype")
} | {
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "rope_parameters": rope(2_000.0, 300_000.0, 8.0),
    "dtype": "float32",
}


@pytest.mark.parametrize("style", ["old", "new", "old_unscaled"])
def test_old_and_new_config_files(
    style, make_gemma, reload_gemma, their_logits, padded_tokens, tmp_path
):
    """Weights beside a config.json as the hub has it: both read the same model from it."""
    changes = dict(num_hidden_layers=5, layer_types=NEW_STYLE["layer_types"])
    make_gemma(seed=2, **changes).save_pretrained(tmp_path)
    config = NEW_STYLE if style == "new" else OLD_STYLE
    if style == "old_unscaled":
        config = config | {"rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg, params = load_pretrained(tmp_path, "float32")
    assert cfg.global_layers == (False, True, False, True, False)
    assert cfg.rope_scale_global == (1.0 if style == "old_unscaled" else 8.0)
    tokens, start, real = padded_tokens(cfg.vocab_size)
    theirs = their_logits(reload_gemma(tmp_path), tokens, start).detach().numpy()
    ours = logits(params, cfg, tokens, start)
    off = np.abs(np.asarray(ours) - theirs)[real].max()
    print(f"\nconfig.json {style}: logits {off:.1e}")
    assert off < LOGIT_ATOL


@pytest.mark.parametrize("cfg", [TINY, GEMMA3_1B, GEMMA3_4B], ids=["tiny", "1b", "4b"])
def test_our_config_files_are_read_by_transformers(cfg, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Gemma3TextConfig"
    assert theirs.query_pre_attn_scalar == cfg.query_scalar
    assert theirs.layer_types.count("full_attention") == sum(cfg.global_layers)
    assert cfg == type(cfg).from_hf(theirs.to_dict())  # nothing is lost on the way back


# ---- weights ------------------------------------------------------------------------------------


def assert_same_weights(cfg, params, model):
    ours, theirs = dict(stored_tensors(cfg, params)), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert np.array_equal(ours[name], weight.detach().numpy()), name


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_their_weights_load_here(make_gemma, tmp_path, shard):
    model = make_gemma(seed=3)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard == "5GB" else len(files) > 3
    assert_same_weights(*load_pretrained(tmp_path, "float32"), model)


def test_their_multimodal_weights_load_here(
    make_multimodal_gemma, their_logits, padded_tokens, tmp_path
):
    """The text tower of a Gemma3ForConditionalGeneration, as the 4B and larger are stored."""
    model = make_multimodal_gemma(seed=4)
    model.save_pretrained(tmp_path)
    cfg, params = load_pretrained(tmp_path, "float32")
    tokens, start, real = padded_tokens(49)  # no image token
    theirs = their_logits(model, tokens, start).detach().numpy()
    off = np.abs(np.asarray(logits(params, cfg, tokens, start)) - theirs)[real].max()
    print(f"\nmultimodal: logits {off:.1e}")
    assert off < LOGIT_ATOL


@pytest.mark.parametrize("size", ["small", "tiny"])
def test_our_weights_load_in_transformers(
    size, make_gemma, reload_gemma, their_logits, padded_tokens, tmp_path
):
    if size == "small":
        cfg, _ = ours_of(make_gemma(), tmp_path / "shape")
    else:
        cfg = TINY
    params = init_params(jax.random.key(6), cfg)
    save_pretrained(tmp_path / "ours", cfg, params)
    model = reload_gemma(tmp_path / "ours")
    assert_same_weights(cfg, params, model)
    tokens, start, real = padded_tokens(cfg.vocab_size)
    theirs = their_logits(model, tokens, start).detach().numpy()
    off = np.abs(np.asarray(logits(params, cfg, tokens, start)) - theirs)[real].max()
    print(f"\nour weights, {size}: logits {off:.1e}")
    assert off < LOGIT_ATOL


# ---- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["three_layers", "one_kv_head_pattern_6", "large_heads_scale_8"])
def test_greedy_generation_token_for_token(case, make_gemma, padded_tokens, tmp_path):
    """200 tokens after 12-column prompts that start at columns 0 and 4; windows of 5, 7 and 11."""
    model = make_gemma(seed=7, **CASES[case])
    with torch.no_grad():
        # Tied embeddings make a random model repeat its last token: louder layers, and a final
        # norm (1 + w) of alternating sign, under which a token no longer points at itself.
        for name, weight in model.named_parameters():
            if "post_" in name or name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.add_(2.0)
        model.model.norm.weight[::2] -= 2.0
    cfg, params = ours_of(model, tmp_path)
    tokens, start, real = padded_tokens(cfg.vocab_size, start=(0, 4), num_tokens=12)
    model.generation_config.eos_token_id = None
    theirs = model.generate(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(real).long(),
        do_sample=False,
        max_new_tokens=200,
        pad_token_id=0,
    ).numpy()
    ours = sample(
        params,
        cfg,
        jnp.asarray(tokens),
        jnp.asarray(start),
        jax.random.key(0),
        num_completions=1,
        max_new_tokens=200,
        temperature=0.0,
        stop_ids=(),
    )
    assert ours.tokens_BT.shape == (2, 212)
    assert np.array_equal(ours.tokens_BT, theirs)
    for row in theirs:  # and the comparison means something: no short cycle at the end
        assert len(set(row[-50:].tolist())) > 5
