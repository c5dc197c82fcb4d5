"""The kernels compile for a TPU v5e without one: needs the PyPI package libtpu, no other.

Mosaic refuses shapes, layouts and memory that the interpreter accepts. Shapes are Gemma 3 1B's.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gemma_cot.axes import make_mesh, replicated, sharding_of
from gemma_cot.config import GEMMA3_1B
from gemma_cot.lora import init_lora
from gemma_cot.model.kernels.decode import decode_attention
from gemma_cot.model.kernels.logprob import chosen_logprob
from gemma_cot.model.kernels.prefill import prefill_attention
from gemma_cot.model.logprob import logprobs_and_entropy
from gemma_cot.model.params import init_params
from gemma_cot.model.sample import sample

pytest.importorskip("libtpu")
pytestmark = pytest.mark.interop
N, K, H, V = 4, 1, 256, 262_144
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.fixture
def num_kernels(monkeypatch):
    """Return f(function, *(shape, dtype)) -> kernels in the program compiled for one v5e chip."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1")
    sharding = SingleDeviceSharding(topology.devices[0])

    def compile_and_count(function, *arrays):
        arguments = [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]
        compiled = jax.jit(function).lower(*arguments).compile()
        return compiled.as_text().count('custom_call_target="tpu_custom_call"')

    return compile_and_count


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("num_positions", "D"), [(1024, 1152), (37, 1152), (600, 5376)])
def test_logprob_compiles(num_kernels, dtype, num_positions, D):
    """Widths of 1B and 27B: the widest float32 tiles must fit the fast memory too."""
    def loss(x_CD, embed_VD, target_C):
        return sum(x.sum() for x in chosen_logprob(x_CD, embed_VD, target_C, 0.9, interpret=False))

    arrays = ((num_positions, D), dtype), ((V, D), dtype), ((num_positions,), jnp.int32)
    assert num_kernels(loss, *arrays) == 1
    assert num_kernels(jax.grad(loss), *arrays) == 2, "a frozen embedding's gradient is not run"
    assert num_kernels(jax.grad(loss, (0, 1)), *arrays) == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("window", [512, None])
@pytest.mark.parametrize("T", [768, 771, 100])
def test_prefill_compiles(num_kernels, dtype, window, T):
    function = partial(prefill_attention, window=window, interpret=False)
    q, kv = ((4, T, N, H), dtype), ((4, T, K, H), dtype)
    assert num_kernels(function, q, kv, kv, ((4,), jnp.int32)) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("window", [512, None])
@pytest.mark.parametrize(("width", "tail"), [(256, 512), (250, 301)])
def test_decode_compiles(num_kernels, dtype, window, width, tail):
    function = partial(decode_attention, window=window, interpret=False)
    prompt, own = ((4, width, K, H), dtype), ((16, tail, K, H), dtype)
    scalars = ((4,), jnp.int32), ((), jnp.int32)
    arrays = (((16, N, H), dtype), prompt, prompt, own, own, *scalars)
    assert num_kernels(function, *arrays) == 3, "prompts, tails, tails over the end"


def test_the_model_with_kernels_compiles_for_eight_chips(monkeypatch):
    """Three layers of Gemma 3 1B, data parallel over v5e:2x4: the update's loss with its gradient
    and the sampling loop, both with kernels. No device gathers another's rows."""
    cfg = dataclasses.replace(
        GEMMA3_1B, num_layers=3, global_layers=(False, False, True), attention="pallas",
        logprob="pallas",
    )  # fmt: skip
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh("8x1", list(topology.devices))

    def abstract(shape, dtype, letters=""):
        sharding = sharding_of(letters, mesh) if letters else replicated(mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda: (
        init_params(jax.random.key(0), cfg, jnp.bfloat16), init_lora(jax.random.key(0), cfg, 32, 16)
    ))  # fmt: skip
    params, lora = jax.tree.map(lambda x: abstract(x.shape, x.dtype), shapes)

    def loss(lora, params, tokens_BT, start_B):
        logp_BT, _ = logprobs_and_entropy(
            params, cfg, tokens_BT, start_B, lora, first_column=256, remat="all"
        )
        return logp_BT.sum()

    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        update = jax.jit(jax.grad(loss)).lower(
            lora, params, abstract((8, 768), jnp.int32, "BT"), abstract((8,), jnp.int32, "B")
        ).compile().as_text()  # fmt: skip
        rollout = sample.lower(
            params, cfg, abstract((8, 256), jnp.int32, "PT"), abstract((8,), jnp.int32, "P"),
            abstract(key.shape, key.dtype), num_completions=4, max_new_tokens=512,
            temperature=1.0, stop_ids=(1, 106), lora=lora,
            prompt_id_P=abstract((8,), jnp.int32, "P"),
        ).compile().as_text()  # fmt: skip
    kernels = 'custom_call_target="tpu_custom_call"'
    assert update.count(kernels) >= 3, "attention, log-prob and its gradient"
    assert rollout.count(kernels) >= 3, "prefill, decode over prompts and over tails"
    assert "all-gather" not in update and "all-gather" not in rollout
