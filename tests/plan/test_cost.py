"""Work counted from shapes: against XLA's count on programs without loops, and against Gemma 3 1B
worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.config import GEMMA3_1B, GEMMA3_12B, ModelConfig
from gemma_cot.model.cache import decode_step, decode_weights, new_cache
from gemma_cot.plan import cost
from gemma_cot.plan.chips import CHIPS, Chip
from gemma_cot.plan.clock import phases_of
from gemma_cot.plan.cost import Cost, Rows, Share
from gemma_cot.plan.programs import call_of

ONE_B = Share(GEMMA3_1B, 32, data=8, model=1, item=2)
# One layer, so that the layer scan hides no work; wide, so that matrix products dominate.
WIDE = ModelConfig(
    num_layers=1, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=1024,
    vocab_size=4096, window=512, global_layers=(True,),
)  # fmt: skip


@pytest.mark.parametrize("micro_batch", [8, 1], ids=["prompt shared", "prompt in each row"])
@pytest.mark.parametrize("remat", ["none", "products", "all"])
@pytest.mark.parametrize("name", ["prefill", "reference_logprobs", "update", "sft"])
def test_flops_are_those_that_xla_counts_without_loops(make_setup, name, remat, micro_batch):
    setup = make_setup(
        1, 1, WIDE, "bfloat16", num_generations=4, prompts_per_rollout=2, mini_batch=2,
        micro_batch=micro_batch, max_prompt_tokens=64, max_completion_tokens=32, lora_rank=32,
        remat=remat, sft_batch=4, sft_micro_batches=1,
    )  # fmt: skip
    call = call_of(name, setup)
    with jax.set_mesh(setup.mesh):
        lowered = call.function.lower(*call.args, **call.options, **call.static)
    counted = lowered.cost_analysis()["flops"]
    ours = sum(phase.flops for phase in phases_of(setup, name))
    if name in ("reference_logprobs", "update"):
        ours /= setup.micro_batches  # a loop, whose body XLA counts once
    # XLA adds what norms, softmax and activations do, 1 to 2.5 % here
    np.testing.assert_allclose(ours, counted, rtol=0.03)


def test_flops_of_a_decode_step_are_those_that_xla_counts(make_setup, monkeypatch):
    """As a TPU decodes; elsewhere adapters that are joined multiply zeros too."""
    monkeypatch.setattr("gemma_cot.model.kernels.layout.platform", lambda: "tpu")
    setup = make_setup(
        1, 1, WIDE, "bfloat16", num_generations=4, prompts_per_rollout=8, max_prompt_tokens=64,
        max_completion_tokens=48, lora_rank=32,
    )  # fmt: skip
    kv = jax.ShapeDtypeStruct((1, 8, 64, 2, 128), jnp.bfloat16)
    start_P = jax.ShapeDtypeStruct((8,), jnp.int32)
    cache = jax.eval_shape(lambda *args: new_cache(WIDE, *args, 32, 48), (kv, kv), start_P)
    token_B, clock = jax.ShapeDtypeStruct((32,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    step = jax.jit(decode_step, static_argnames="cfg")
    with jax.set_mesh(setup.mesh):
        weights = jax.eval_shape(
            lambda params, lora: decode_weights(params, WIDE, lora), setup.params, setup.state.lora
        )
        lowered = step.lower(weights, WIDE, token_B, clock, cache)
    ours = cost.decode_step(Share(WIDE, 32, 1, 1, 2), 32, 8, 64, 48).flops
    np.testing.assert_allclose(ours, lowered.cost_analysis()["flops"], rtol=0.02)


def test_gemma3_1b_by_hand():
    # q, o: 1152 x 1024; k, v: 1152 x 256; gate, up, down: 1152 x 6912; 26 layers
    assert ONE_B.layer_weights == 26 * 1152 * (2 * 1024 + 2 * 256 + 3 * 6912) == 697_761_792
    assert 2 * ONE_B.layer_weights == pytest.approx(1.40e9, rel=5e-3)  # FLOPs a token
    # rank 32: 32 x (rows + columns) of each of them
    sums = (1152 + 1024) * 2 + (1152 + 256) * 2 + (1152 + 6912) * 3
    assert ONE_B.whole_adapter == ONE_B.adapter == 26 * 32 * sums == 26_091_520
    assert ONE_B.cache_token == 2 * 26 * 256 * 2  # keys and values, one head, bfloat16
    last = cost.unembedding(ONE_B, 3, 5, passes=2, reads=7, logits=True)
    assert last.flops == 2 * 2 * 15 * 1152 * 262_144
    assert last.hbm == 2 * (7 * 2 * 1152 * 262_144 + 2 * 4 * 15 * 262_144)


def test_heads_mlp_and_vocabulary_are_shared_keys_and_values_where_their_heads_divide():
    whole, cut = (Share(GEMMA3_12B, 32, 1, model, 2) for model in (1, 8))
    layer = 3840 * (2 * 16 * 256 + 3 * 15_360)
    assert whole.layer_weights == 48 * (layer + 2 * 3840 * 8 * 256)
    assert cut.layer_weights == 48 * (layer / 8 + 2 * 3840 * 8 * 256), "k and v are not cut"
    assert cut.cache_token == whole.cache_token / 8, "8 heads over 8 chips"
    assert Share(GEMMA3_12B, 32, 1, 16, 2).cache_token == whole.cache_token
    assert cut.pair == whole.pair / 8 == 4 * 48 * 2 * 256
    assert cut.local("VD") == whole.local("VD") / 8 and cut.whole_adapter == whole.whole_adapter


def test_rows_that_share_a_prompt_run_it_once():
    # 2 groups of 4 rows, 3 prompt columns, 5 of completion
    alone, shared = Rows(8, 3, 5), Rows(8, 3, 5, group=4)
    assert alone.tokens == 8 * 8 and shared.tokens == 2 * 3 + 8 * 5
    assert alone.pairs(8) == 8 * 8 * 8 and shared.pairs(8) == 2 * 3 * 3 + 8 * 5 * 8
    # blocks of 4 queries: columns 0-3 see 4, 4-7 see 8; completions 3-6 see 7, 7 sees 8
    assert alone.pairs(4) == 8 * 4 * (4 + 8)
    assert shared.pairs(4) == 2 * 3 * 3 + 8 * (4 * 7 + 1 * 8)


def test_passes_over_weights_adapter_and_attention():
    batch = Rows(2, 3, 5)
    body = cost.layers(ONE_B, batch, 1, 0, 0)
    assert body.flops == 2 * 16 * ONE_B.layer_weights
    assert body.hbm == 2 * ONE_B.layer_weights + 26 * 2 * 16 * 1152 * 2 and body.ici == 0
    assert cost.layers(ONE_B, batch, 0, 1, 0).flops == 2 * 16 * ONE_B.adapter
    assert cost.layers(ONE_B, batch, 0, 0, 1).flops == ONE_B.pair
    two = Share(GEMMA3_1B, 32, 4, 2, 2)
    assert cost.layers(two, batch, 1, 0, 0).ici == 2 * 26 * 16 * 1152 * 2  # all-reduce of 2: 2 / 2


def test_sampling_takes_a_step_for_every_token_but_the_first():
    fill, decode = cost.sampling(ONE_B, 4, 4, 16, 256, 512)
    assert fill == cost.prefill(ONE_B, 4, 256)
    assert decode == cost.decode_step(ONE_B, 16, 4, 256, 512).times(511)
    # 8 slots for 16 rows: two rounds, each slot with its prompt's cache to itself
    _, queued = cost.sampling(ONE_B, 4, 4, 8, 256, 512)
    assert queued == cost.decode_step(ONE_B, 8, 8, 256, 512).times(1022)


def test_columns_that_a_kernel_reads():
    cfg = ModelConfig(1, 2, 1, 1, 2, 2, 5, window=4, global_layers=(True,))
    # prompt of 3, tail of 3: token 1 sees 3 + 2, token 2 sees 3 + 3
    assert cost.visible(cfg, 3, 3) == (3.0, 2.5)
    local = ModelConfig(1, 2, 1, 1, 2, 2, 5, window=4, global_layers=(False,))
    assert cost.visible(local, 3, 3) == (1.5, 2.5), "4 columns each, own tail first"


def test_an_update_moves_the_adapter_and_sends_its_gradient():
    update = cost.optimiser(ONE_B)
    assert update.hbm == 7 * 4 * 26_091_520 and update.ici == 2 * 7 / 8 * 4 * 26_091_520
    assert cost.ring(100.0, 1) == 0


def test_the_bound_of_phases_is_the_sum_of_what_limits_each():
    chip = Chip(memory=1, flops=10, hbm=100, ici=1000)
    compute, memory, wire = Cost(30, 100, 0), Cost(1, 200, 0), Cost(0, 0, 5000)
    assert cost.bound([compute], chip) == (3.0, "compute")
    assert cost.bound([compute, memory], chip) == (5.0, "compute")
    assert cost.bound([compute, memory, wire], chip) == (10.0, "interconnect")
    assert cost.bound([memory.times(2)], chip) == (4.0, "HBM")
    assert compute + memory == Cost(31, 300, 0)


def test_decoding_1b_on_v5e_needs_its_weights_read_each_step():
    alone = cost.decode_step(ONE_B, 1, 1, 256, 512)
    seconds, limiter = cost.bound([alone], CHIPS["TPU v5 lite"])
    # (697.8 M in layers + 302.0 M in the embedding + 26.1 M of adapter) x 2 bytes / 819 GB/s
    assert limiter == "HBM" and seconds == pytest.approx(2.505e-3 + 768 * 26_624 / 819e9, rel=1e-3)
