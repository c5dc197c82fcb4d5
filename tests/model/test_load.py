"""Hugging Face files: written and read back bit for bit, in every layout; every damage is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_cot.axes import make_mesh
from gemma_cot.model import load
from gemma_cot.model.load import load_pretrained, save_pretrained
from gemma_cot.model.params import param_shardings

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def model_dir(cfg, params, tmp_path):
    """A private folder with the test model in one file."""
    save_pretrained(tmp_path, cfg, params)
    return tmp_path


@pytest.fixture
def sharded_dir(cfg, params, tmp_path, monkeypatch):
    """A private folder with the test model in many files of at most 10,000 bytes."""
    monkeypatch.setattr(load, "SHARD_BYTES", 10_000)
    save_pretrained(tmp_path, cfg, params)
    return tmp_path


def rewrite(folder, change) -> None:
    """Store the tensors of model.safetensors again as `change(tensors)` leaves or returns them."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def assert_same(got, want):
    """Assert two parameter trees equal in structure, dtype and every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# -- round trips


def test_one_file_comes_back_bit_for_bit(cfg, params, model_dir):
    assert sorted(path.name for path in model_dir.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    loaded_cfg, loaded = load_pretrained(model_dir, "float32")
    assert loaded_cfg == cfg
    assert_same(loaded, params)


def test_bfloat16_comes_back_bit_for_bit(cfg, params, in_bf16, tmp_path):
    half = in_bf16(params)
    save_pretrained(tmp_path, cfg, half)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(load_pretrained(tmp_path)[1], half)  # bfloat16 is the default


def test_float32_file_is_rounded_to_the_wanted_dtype(params, in_bf16, model_dir):
    assert_same(load_pretrained(model_dir, "bfloat16")[1], in_bf16(params))


def test_shards_come_back_bit_for_bit(params, sharded_dir):
    """The index names each tensor's file; no file holds more than SHARD_BYTES unless one tensor."""
    index = json.loads((sharded_dir / INDEX).read_text())
    files = sorted(path.name for path in sharded_dir.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [[t.nbytes for t in load_file(sharded_dir / name).values()] for name in files]
    assert all(sum(s) <= 10_000 or len(s) == 1 for s in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert index["metadata"]["total_size"] == 4 * sum(w.size for w in jax.tree.leaves(params))
    assert_same(load_pretrained(sharded_dir, "float32")[1], params)


@pytest.mark.parametrize("places", [None, [], {"a": 1}])
def test_an_index_without_files_is_refused(sharded_dir, places):
    (sharded_dir / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="weight_map must name a file per tensor"):
        load_pretrained(sharded_dir)


def test_stored_layout_is_hugging_faces(params, model_dir):
    """torch's Linear stores [out, in]; heads are the slow axis of q_proj's out and o_proj's in."""
    stored = load_file(model_dir / "model.safetensors")
    assert len(stored) == 2 + 13 * 3
    layers = jax.tree.map(np.asarray, params["layers"])
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    assert q.shape == (6 * 8, 20)
    np.testing.assert_array_equal(q[5 * 8 + 3], layers["q"][1, :, 5, 3])
    o = stored["model.layers.2.self_attn.o_proj.weight"]
    assert o.shape == (20, 6 * 8)
    np.testing.assert_array_equal(o[:, 5 * 8 + 3], layers["o"][2, 5, 3, :])
    np.testing.assert_array_equal(
        stored["model.layers.0.mlp.down_proj.weight"], layers["down"][0].T
    )
    np.testing.assert_array_equal(
        stored["model.layers.0.post_feedforward_layernorm.weight"], layers["post_mlp_norm"][0]
    )
    np.testing.assert_array_equal(stored[EMBED], params["embed"])


@pytest.mark.parametrize("mesh_text", ["4x1", "2x2"])
def test_mesh_places_every_leaf(params, model_dir, mesh_text):
    mesh = make_mesh(mesh_text)
    _, loaded = load_pretrained(model_dir, "float32", mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == param_shardings(mesh)
    assert_same(loaded, params)


def test_saving_over_shards_leaves_nothing_of_them(cfg, params, sharded_dir, monkeypatch):
    """A stale index would win over the new single file, and the old weights would load."""
    monkeypatch.undo()
    doubled = jax.tree.map(lambda w: np.asarray(w) * 2, params)
    save_pretrained(sharded_dir, cfg, doubled)
    assert_same(load_pretrained(sharded_dir, "float32")[1], doubled)


def test_tokenizer_files_travel_along(cfg, params, tokenizer_dir, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 106, 107]}')
    (source / "notes.txt").write_text("not a tokenizer file")
    save_pretrained(out, cfg, params, source)
    for name in ("tokenizer.model", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "notes.txt").exists()


# -- other checkpoints' layouts


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_tower_of_a_multimodal_checkpoint(cfg, params, model_dir, prefix):
    vision = prefix.replace("language_model.model.", "").replace("language_model.", "")
    other = {
        f"{vision}vision_tower.vision_model.post_layernorm.weight": np.ones(3, np.float32),
        f"{vision}multi_modal_projector.mm_input_projection_weight": np.ones((2, 2), np.float32),
    }

    def nest(tensors):
        return {prefix + k.removeprefix("model."): v for k, v in tensors.items()} | other

    rewrite(model_dir, nest)
    nested = {"model_type": "gemma3", "text_config": cfg.to_hf(), "vision_config": {}}
    (model_dir / "config.json").write_text(json.dumps(nested))
    loaded_cfg, loaded = load_pretrained(model_dir, "float32")
    assert loaded_cfg == cfg
    assert_same(loaded, params)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lm_head_that_repeats_the_embedding_is_accepted(params, in_bf16, model_dir, name, dtype):
    rewrite(model_dir, lambda tensors: tensors.update({name: tensors[EMBED].copy()}))
    want = params if dtype == "float32" else in_bf16(params)
    assert_same(load_pretrained(model_dir, dtype)[1], want)


def test_lm_head_of_its_own_is_refused(model_dir):
    rewrite(model_dir, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight: must equal the embedding"):
        load_pretrained(model_dir)


# -- damage


def refused(folder, match: str) -> bool:
    """Assert that loading raises a ValueError that matches."""
    with pytest.raises(ValueError, match=match):
        load_pretrained(folder, "float32")
    return True


def test_missing_tensor_is_named(model_dir):
    rewrite(model_dir, lambda tensors: tensors.pop(NORM) is None)
    assert refused(model_dir, "1 tensors are missing, the first is model.norm.weight")


def test_extra_tensor_is_named(model_dir):
    extra = {"model.layers.3.mlp.up_proj.weight": np.zeros((28, 20), np.float32)}
    rewrite(model_dir, lambda tensors: tensors.update(extra))
    assert refused(model_dir, r"model.layers.3.mlp.up_proj.weight in .* 3-layer")


@pytest.mark.parametrize("dtype", [np.int8, jnp.float8_e4m3fn])
def test_quantised_tensor_is_named(model_dir, dtype):
    rewrite(model_dir, lambda tensors: tensors.update({NORM: tensors[NORM].astype(dtype)}))
    assert refused(model_dir, f"tensor {NORM} in .*: must be float64, .* got (I8|F8_E4M3); take")


def test_misshapen_tensor_is_named(model_dir):
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite(model_dir, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    assert refused(model_dir, rf"{name}: shape must be \(48, 20\) .* got \(20, 48\)")


def test_doubled_tensor_is_named_with_both_files(model_dir):
    save_file({NORM: np.zeros(20, np.float32)}, model_dir / "other.safetensors")
    assert refused(model_dir, f"{NORM}: must be stored once.*model.safetensors and other")


def test_doubled_tensor_under_two_prefixes_is_named(model_dir):
    twin = {"language_model." + NORM: np.zeros(20, np.float32)}
    rewrite(model_dir, lambda tensors: tensors.update(twin))
    assert refused(model_dir, f"{NORM}: must be stored once")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file_is_named(model_dir, kept):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert refused(model_dir, "model.safetensors: must be a whole safetensors file")


def test_missing_shard_is_named(sharded_dir):
    (sharded_dir / sorted(p.name for p in sharded_dir.glob("*.safetensors"))[1]).unlink()
    assert refused(sharded_dir, "missing .'model-00002-of-")


def test_no_weights_at_all(model_dir):
    (model_dir / "model.safetensors").unlink()
    assert refused(model_dir, r"must hold \*.safetensors weights, got none")


def test_missing_config(model_dir):
    (model_dir / "config.json").unlink()
    assert refused(model_dir, "config.json: file must exist")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"model_type": ', "must be JSON"),
        (b"[1]", "object, got list"),
        (b"\xff{}", "must be JSON"),
    ],
)
def test_bad_config(model_dir, text, match):
    (model_dir / "config.json").write_bytes(text)
    assert refused(model_dir, f"config.json: .*{match}")


def test_config_of_another_size(cfg, model_dir):
    other = dataclasses.replace(cfg, mlp_dim=30)
    (model_dir / "config.json").write_text(json.dumps(other.to_hf()))
    assert refused(model_dir, r"mlp\..*_proj.weight: shape must be .*30")


def test_what_the_disk_refuses_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/x.safetensors"):
        load.save_tensors(tmp_path / "nowhere" / "x.safetensors", {"x": np.zeros(4, np.float32)})
