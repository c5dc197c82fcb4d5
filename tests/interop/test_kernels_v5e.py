"""The kernels compile for a TPU v5e without one: needs the PyPI package libtpu, no other.

Mosaic refuses shapes, layouts and memory that the interpreter accepts. Shapes are Gemma 3 1B's.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gemma_cot.model.kernels.decode import decode_attention
from gemma_cot.model.kernels.logprob import chosen_logprob
from gemma_cot.model.kernels.prefill import prefill_attention

pytest.importorskip("libtpu")
pytestmark = pytest.mark.interop
N, K, H, D, V = 4, 1, 256, 1152, 262_144
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
@pytest.mark.parametrize("num_positions", [1024, 37])
def test_logprob_compiles(num_kernels, dtype, num_positions):
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
    assert num_kernels(function, *arrays) == 2, "one over prompts, one over tails"
