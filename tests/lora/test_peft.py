"""PEFT folders: ours are literal and come back bit for bit; others are read, or refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_cot.lora import TARGETS, Lora, init_lora, load_peft, merge, save_peft
from gemma_cot.model.gemma import logits
from gemma_cot.model.load import load_pretrained, save_pretrained

RANK = 4
PREFIX = "base_model.model.model.layers."
FIRST = PREFIX + "0.self_attn.q_proj.lora_A.weight"
forward = jax.jit(logits, static_argnames="cfg")


def drawn_lora(cfg, targets=TARGETS, alpha=10.0) -> Lora:
    """Return an adapter whose every leaf is random."""
    lora = init_lora(jax.random.key(3), cfg, RANK, alpha, targets)
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), lora
    )


@pytest.fixture(scope="module")
def saved(cfg, tmp_path_factory):
    """A folder written by save_peft, and the adapter in it: read only."""
    folder = tmp_path_factory.mktemp("saved")
    lora = drawn_lora(cfg)
    save_peft(folder, cfg, lora, "google/gemma-3-1b-it")
    return folder, lora


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved folder that a test may spoil."""
    return shutil.copytree(saved[0], tmp_path / "adapter")


def rewrite_config(folder, drop=(), **changes):
    """Change options of adapter_config.json."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def rewrite_tensors(folder, change):
    """Replace {name: array} of adapter_model.safetensors by what `change` makes of it."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def assert_same(got: Lora, expected: Lora):
    """Assert that two adapters have the same pairs, bit for bit, and the same factor."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)  # scale is part of it
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, got, expected)))


# ---- what we write ------------------------------------------------------------------------------


def test_config_is_what_peft_reads(saved):
    config = json.loads((saved[0] / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "google/gemma-3-1b-it",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 10,  # 2.5 * 4
        "lora_dropout": 0.0,
        "target_modules": [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def test_names_shapes_and_dtype(saved):
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    assert len(tensors) == 42  # 3 layers * 7 targets * 2
    assert {array.dtype for array in tensors.values()} == {np.dtype("float32")}
    # [R, in] and [out, R]; D 20, N H = 6 * 8 = 48, K H = 2 * 8 = 16, F 28
    shapes = {
        "0.self_attn.q_proj.lora_A": (4, 20),
        "0.self_attn.q_proj.lora_B": (48, 4),
        "1.self_attn.k_proj.lora_B": (16, 4),
        "2.self_attn.v_proj.lora_B": (16, 4),
        "2.self_attn.o_proj.lora_A": (4, 48),
        "2.self_attn.o_proj.lora_B": (20, 4),
        "0.mlp.gate_proj.lora_B": (28, 4),
        "1.mlp.up_proj.lora_A": (4, 20),
        "2.mlp.down_proj.lora_A": (4, 28),
        "2.mlp.down_proj.lora_B": (20, 4),
    }
    got = {name: tensors[f"{PREFIX}{name}.weight"].shape for name in shapes}
    assert got == shapes


def test_entries_of_the_two_awkward_layouts(saved):
    """Query head n, dim h is row 8 n + h of lora_B; for o it is a column of lora_A."""
    tensors, lora = load_file(saved[0] / "adapter_model.safetensors"), saved[1]
    b_LRNH, a_LNHR = lora.layers["q"]["b"], lora.layers["o"]["a"]
    stored = tensors[f"{PREFIX}2.self_attn.q_proj.lora_B.weight"]
    assert stored[8 * 5 + 3, 1] == b_LRNH[2, 1, 5, 3]
    stored = tensors[f"{PREFIX}1.self_attn.o_proj.lora_A.weight"]
    assert stored[2, 8 * 4 + 7] == a_LNHR[1, 4, 7, 2]


@pytest.mark.parametrize("targets", [TARGETS, ("down",), ("v", "q")])
def test_save_then_load_is_bit_identical(cfg, tmp_path, targets):
    lora = drawn_lora(cfg, targets)
    save_peft(tmp_path / "new" / "adapter", cfg, lora, None)  # makes the folders
    assert_same(load_peft(tmp_path / "new" / "adapter", cfg), lora)


def test_only_the_targets_that_are_there_are_named(cfg, tmp_path):
    save_peft(tmp_path, cfg, drawn_lora(cfg, ("down", "v", "q")), None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize(
    ("rank", "alpha", "written"),
    # 16 / 32 is exact; 29 / 7 is not: 29 / 7 * 7 = 29.000000000000004 in binary; 0.3 stays
    [(32, 16.0, 16), (7, 29.0, 29), (1, 0.3, 0.3)],
)
def test_alpha_survives(cfg, tmp_path, rank, alpha, written):
    lora = init_lora(jax.random.key(0), cfg, rank, alpha, ("k",))
    save_peft(tmp_path, cfg, lora, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, written)
    assert load_peft(tmp_path, cfg).scale == alpha / rank


def test_saves_a_bf16_adapter_as_float32(cfg, saved, tmp_path):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), saved[1])
    save_peft(tmp_path, cfg, low, "base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype("float32")}
    assert_same(load_peft(tmp_path, cfg), jax.tree.map(lambda x: x.astype(jnp.float32), low))


# ---- what others write --------------------------------------------------------------------------


def test_an_adapter_written_by_hand(cfg, params, tmp_path):
    """Logits are those of W + alpha / r * B A, added by NumPy to the stored weights."""
    rng = np.random.default_rng(11)
    save_pretrained(tmp_path / "base", cfg, params)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    sizes = {  # [out, in]: D 20, N H 48, K H 16, F 28
        "self_attn.q_proj": (48, 20),
        "self_attn.k_proj": (16, 20),
        "self_attn.v_proj": (16, 20),
        "self_attn.o_proj": (20, 48),
        "mlp.gate_proj": (28, 20),
        "mlp.up_proj": (28, 20),
        "mlp.down_proj": (20, 28),
    }
    adapter = {}
    for i in range(3):
        for module, (out, into) in sizes.items():
            a = (0.3 * rng.standard_normal((5, into))).astype(np.float32)
            b = (0.3 * rng.standard_normal((out, 5))).astype(np.float32)
            adapter[f"base_model.model.model.layers.{i}.{module}.lora_A.weight"] = a
            adapter[f"base_model.model.model.layers.{i}.{module}.lora_B.weight"] = b
            weights[f"model.layers.{i}.{module}.weight"] += np.float32(7 / 5) * (b @ a)
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 5,
        "lora_alpha": 7,
        "target_modules": r".*\.(self_attn|mlp)\..*_proj",
        "bias": "none",
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "base" / "model.safetensors")
    _, merged = load_pretrained(tmp_path / "base", "float32")

    lora = load_peft(tmp_path / "adapter", cfg)
    tokens_BT = jax.random.randint(jax.random.key(5), (2, 9), 0, cfg.vocab_size)
    got = forward(params, cfg, tokens_BT, lora=lora)
    expected = forward(merged, cfg, tokens_BT)
    assert lora.scale == 1.4
    assert np.abs(expected - forward(params, cfg, tokens_BT)).max() > 1  # it does something
    # two orders of summation in float32, logits of about 3 (see test_lora: measured 3e-6)
    np.testing.assert_allclose(got, expected, atol=3e-5, rtol=0)
    # and merging gives those very weights: 1.4 * sum of 5 products of about 0.1, rounded once
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=0),
        merge(params, lora),
        merged,
    )


@pytest.mark.parametrize(
    "tower",
    ["base_model.model.model.language_model.", "base_model.model.language_model.model."],
)
def test_multimodal_names(cfg, saved, folder, tower):
    """Newer and older names of the text tower; an adapter on the vision tower is left out."""

    def rename(tensors):
        moved = {
            tower + name.removeprefix("base_model.model.model."): x for name, x in tensors.items()
        }
        vision = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
        return moved | {f"{vision}.lora_A.weight": np.ones((4, 4), np.float32)}

    rewrite_tensors(folder, rename)
    assert f"{tower}layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        folder / "adapter_model.safetensors"
    )
    assert_same(load_peft(folder, cfg), saved[1])


def test_rslora(cfg, saved, folder):
    rewrite_config(folder, use_rslora=True, lora_alpha=3)
    assert_same(load_peft(folder, cfg), saved[1].replace(scale=1.5))  # 3 / sqrt(4)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_low_precision_tensors_become_float32(cfg, saved, folder, dtype):
    rewrite_tensors(folder, lambda tensors: {k: x.astype(dtype) for k, x in tensors.items()})
    rounded = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype), "float32"), saved[1])
    assert_same(load_peft(folder, cfg), rounded)


@pytest.mark.parametrize("listed", [["q_proj"], "all-linear", r".*\.q_proj$", None])
def test_targets_are_those_of_the_tensors(cfg, saved, folder, listed):
    rewrite_config(folder, target_modules=listed)
    keep = ("k_proj", "down_proj")
    rewrite_tensors(
        folder, lambda tensors: {n: x for n, x in tensors.items() if n.split(".")[-3] in keep}
    )
    layers = {target: saved[1].layers[target] for target in ("k", "down")}
    assert_same(load_peft(folder, cfg), saved[1].replace(layers=layers))


def test_options_without_effect_are_fine(cfg, saved, folder):
    """As PEFT writes them (0.18 and before): nulls, dropout, and initialisers that keep W."""
    rewrite_config(
        folder,
        drop=("use_dora", "bias", "rank_pattern"),
        alpha_pattern=None,
        modules_to_save=[],
        lora_dropout=0.05,
        init_lora_weights="gaussian",
        layer_replication=None,
        loftq_config={},
        alora_invocation_tokens=None,
        exclude_modules="vision_tower",
    )
    assert_same(load_peft(folder, cfg), saved[1])


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'; merge"),
        ({"peft_type": None}, "peft_type must be 'LORA', got None; merge"),
        ({"use_dora": True}, "use_dora must be False, got True; merge the adapter with PEFT"),
        ({"bias": "lora_only"}, "bias must be 'none', got 'lora_only'; "),
        ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern must be {} .*got {'q_proj': 8}; "),
        ({"alpha_pattern": {"v_proj": 1}}, r"alpha_pattern must be {} .*got {'v_proj': 1}; "),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save must be .*got \['lm_head'\]; "),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must be .*'pissa_niter_4'; "),
        ({"alora_invocation_tokens": [2]}, r"alora_invocation_tokens must be None, got \[2\]; "),
        ({"layer_replication": [[1, 2], [0, 1]]}, r"layer_replication must be .*\[\[1, 2\]"),
        ({"r": 0}, "r must be a whole number from 1, got 0; repair it"),
        ({"r": "4"}, "r must be a whole number from 1, got '4'; "),
        ({"r": True}, "r must be a whole number from 1, got True; "),
        ({"r": None}, "r must be a whole number from 1, got None; "),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number, got '16'; repair it"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number, got None; "),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan; "),
    ],
)
def test_refused_options(cfg, folder, changes, message):
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}") as error:
        load_peft(folder, cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"adapter_config.json: must be JSON, got .*; "),
        ("[1]", r"adapter_config.json: must hold a JSON object, got list; "),
        ("{}", r"adapter_config.json: peft_type must be 'LORA', got None; "),
    ],
)
def test_refused_config_files(cfg, folder, text, message):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_peft(folder, cfg)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_refused_missing_files(cfg, folder, name):
    (folder / name).unlink()
    message = (
        rf"{folder}: must hold adapter_config.json and adapter_model.safetensors, got no {name};"
    )
    with pytest.raises(ValueError, match=message):
        load_peft(folder, cfg)


def test_refused_missing_folder(cfg, tmp_path):
    message = "got no adapter_config.json and no adapter_model.safetensors; point --adapter at"
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "nothing", cfg)


def test_refused_quantised_tensors(cfg, folder):
    rewrite_tensors(folder, lambda tensors: {n: x.astype(np.int8) for n, x in tensors.items()})
    with pytest.raises(ValueError, match="tensor .*lora_A.* in .*: must be float64, .* got I8"):
        load_peft(folder, cfg)


def without(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def plus(name, shape=(4, 20)):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # A without B, B without A, a whole layer without its pair
        (
            without(f"{PREFIX}1.mlp.up_proj.lora_B.weight"),
            r"1.mlp.up_proj.lora_B.weight: must be in",
        ),
        (without(FIRST), r"0.self_attn.q_proj.lora_A.weight: must be in .*got none; save"),
        (
            lambda tensors: {k: x for k, x in tensors.items() if ".layers.2." not in k},
            r"tensor base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight: must be in .*"
            r"adapter_model.safetensors \(lora_A and lora_B of every layer of q\), got none; ",
        ),
        # names that are not ours: a layer too many, another module, another kind of tensor
        (
            plus(f"{PREFIX}3.self_attn.q_proj.lora_A.weight"),
            "layers.3.self_attn.q_proj.*layers 0 to 2",
        ),
        (plus("base_model.model.lm_head.lora_A.weight"), "tensor base_model.model.lm_head.lora_A"),
        (
            plus("base_model.model.model.embed_tokens.lora_embedding_A"),
            "lora_embedding_A in .*must be lora_A or lora_B of .*got another name; use",
        ),
        (plus(f"{PREFIX}0.self_attn.q_proj.lora_B.bias", (48,)), "q_proj.lora_B.bias in"),
        (
            plus(f"{PREFIX}0.self_attn.q_proj.lora_magnitude_vector", (48,)),
            "lora_magnitude_vector in",
        ),
        (plus(f"{PREFIX}0.self_attn.q_proj.lora_A.default.weight"), "lora_A.default.weight in"),
        (plus(FIRST.removeprefix("base_model.model.")), r"tensor model.layers.0.*got another name"),
        # the same tensor under the text-only and the multimodal name
        (
            plus(FIRST.replace("model.layers", "model.language_model.layers")),
            "layers.0.self_attn.q_proj.lora_A.weight in .*: must be stored once, got it under two",
        ),
        # shapes: transposed, of another rank, of another model
        (
            lambda tensors: tensors | {FIRST: np.zeros((20, 4), np.float32)},
            r"lora_A.weight: shape must be \(4, 20\) by --model and .*got \(20, 4\); ",
        ),
        (plus(FIRST, (8, 20)), r"shape must be \(4, 20\) by --model and .*got \(8, 20\); "),
        (plus(FIRST, (80,)), r"shape must be \(4, 20\) by --model and .*got \(80,\); "),
        (
            plus(f"{PREFIX}2.self_attn.o_proj.lora_B.weight", (24, 4)),
            r"layers.2.self_attn.o_proj.lora_B.weight: shape must be \(20, 4\) .*got \(24, 4\); ",
        ),
        (lambda tensors: {}, "must be lora_A or lora_B of q, k, .*, got no tensor; use an adapter"),
    ],
)
def test_refused_tensors(cfg, folder, change, message):
    rewrite_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_peft(folder, cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_refused_truncated_file(cfg, folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="safetensors: must be a whole safetensors file, got .*; "):
        load_peft(folder, cfg)
