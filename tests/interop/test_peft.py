"""Our adapters work in PEFT and PEFT's work here, on a small random Gemma 3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.lora import TARGETS, init_lora, load_peft, merge, save_peft
from gemma_cot.model.gemma import logits
from gemma_cot.model.load import load_pretrained, save_pretrained, stored_tensors

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

# Two orders of summation in float32 on logits of size 1 to 5; measured below 1e-5.
LOGIT_ATOL = 1e-4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(make_gemma, tmp_path):
    """Return (folder, cfg, params) of a random model that transformers saved."""
    folder = tmp_path / "base"
    make_gemma(seed=1).save_pretrained(folder)
    return folder, *load_pretrained(folder, "float32")


def random_lora(cfg, targets, rank=4, alpha=10.0):
    lora = init_lora(jax.random.key(3), cfg, rank, alpha, targets)
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), lora
    )


def randomise_b(model):
    """Give every lora_B of a PEFT model random entries (PEFT starts them at 0)."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def distance(ours, theirs, real):
    return np.abs(np.asarray(ours) - theirs.detach().numpy())[real].max()


@pytest.mark.parametrize("targets", [TARGETS, ("o", "gate")])
def test_our_adapter_in_peft(base, targets, reload_gemma, their_logits, padded_tokens, tmp_path):
    folder, cfg, params = base
    tokens, start, real = padded_tokens(cfg.vocab_size)
    plain = logits(params, cfg, tokens, start)
    lora = random_lora(cfg, targets)
    save_peft(tmp_path / "adapter", cfg, lora, str(folder))

    model = peft.PeftModel.from_pretrained(reload_gemma(folder), tmp_path / "adapter").eval()
    ours = logits(params, cfg, tokens, start, lora)
    off = distance(ours, their_logits(model, tokens, start), real)
    print(f"\nour adapter in PEFT, {len(targets)} targets: logits {off:.1e}")
    assert off < LOGIT_ATOL
    assert np.abs(np.asarray(ours) - np.asarray(plain))[real].max() > 100 * LOGIT_ATOL
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 10, str(folder))
    # every tensor of the file found its place: PEFT's copies are ours, and there are no others
    state = peft.get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path / "again")
    again = load_peft(tmp_path / "again", cfg)
    assert len(state) == 3 * 2 * len(targets)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, lora)))


def test_peft_finds_the_base_model_by_its_name(base, their_logits, padded_tokens, tmp_path):
    folder, cfg, params = base
    lora = random_lora(cfg, TARGETS)
    save_peft(tmp_path / "adapter", cfg, lora, str(folder))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens, start, real = padded_tokens(cfg.vocab_size)
    off = distance(
        logits(params, cfg, tokens, start, lora), their_logits(model, tokens, start), real
    )
    assert off < LOGIT_ATOL


PEFT_CONFIGS = {
    "all": dict(r=3, lora_alpha=5, target_modules=PROJECTIONS),
    "two": dict(r=8, lora_alpha=8, target_modules=["v_proj", "down_proj"], lora_dropout=0.1),
    "regex": dict(r=2, lora_alpha=7, target_modules=r".*\.self_attn\.(q|o)_proj"),
    "all_linear": dict(r=2, lora_alpha=1, target_modules="all-linear"),
    "rslora": dict(r=5, lora_alpha=4, target_modules=PROJECTIONS, use_rslora=True),
    "gaussian": dict(r=4, lora_alpha=8, target_modules=["k_proj"], init_lora_weights="gaussian"),
}


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_a_peft_adapter_here(base, case, reload_gemma, their_logits, padded_tokens, tmp_path):
    folder, cfg, params = base
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CONFIGS[case])
    model = randomise_b(peft.get_peft_model(reload_gemma(folder), config))
    model.save_pretrained(tmp_path / "adapter")
    lora = load_peft(tmp_path / "adapter", cfg)
    tokens, start, real = padded_tokens(cfg.vocab_size)
    ours = logits(params, cfg, tokens, start, lora)
    theirs = their_logits(model, tokens, start)
    off = distance(ours, theirs, real)
    print(f"\nPEFT adapter here, {case}: logits {off:.1e}")
    assert off < LOGIT_ATOL
    with model.disable_adapter():
        assert distance(ours, their_logits(model, tokens, start), real) > 100 * LOGIT_ATOL
    # PEFT's merge_and_unload and our merge give the same weights
    merged = dict(model.merge_and_unload().named_parameters())
    for name, weight in stored_tensors(cfg, merge(params, lora)):
        # one float32 rounding apart, of weights below 2
        np.testing.assert_allclose(weight, merged[name].detach().numpy(), atol=1e-6, rtol=0)


def test_a_bf16_peft_adapter_here(base, reload_gemma, tmp_path):
    folder, cfg, _ = base
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=PROJECTIONS)
    model = randomise_b(peft.get_peft_model(reload_gemma(folder), config)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "adapter")
    lora = load_peft(tmp_path / "adapter", cfg)
    theirs = model.base_model.model.model.layers[2].self_attn.o_proj.lora_B["default"].weight
    assert theirs.dtype == torch.bfloat16
    # stored [D, R]; ours [R, D]; bf16 to float32 is exact
    assert np.array_equal(lora.layers["o"]["b"][2].T, theirs.detach().float().numpy())


def test_a_multimodal_peft_adapter_here(
    make_multimodal_gemma, their_logits, padded_tokens, tmp_path
):
    """Names as PEFT writes them for Gemma3ForConditionalGeneration, the 4B and larger models."""
    plain = make_multimodal_gemma(seed=4)
    plain.save_pretrained(tmp_path / "base")
    cfg, params = load_pretrained(tmp_path / "base", "float32")
    # q_proj and the like are in the vision tower too: its adapters are left out here
    adapter = peft.LoraConfig(r=3, lora_alpha=5, target_modules=PROJECTIONS)
    model = randomise_b(peft.get_peft_model(plain, adapter))
    model.save_pretrained(tmp_path / "adapter")
    lora = load_peft(tmp_path / "adapter", cfg)
    assert set(lora.layers) == set(TARGETS)
    tokens, start, real = padded_tokens(49)  # no image token
    off = distance(
        logits(params, cfg, tokens, start, lora), their_logits(model, tokens, start), real
    )
    print(f"\nmultimodal PEFT adapter: logits {off:.1e}")
    assert off < LOGIT_ATOL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_dora=True), "use_dora must be False"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern must be"),
        (dict(bias="lora_only"), "bias must be 'none'"),
        (dict(modules_to_save=["norm"]), "modules_to_save must be"),
        (dict(layers_to_transform=[0, 2]), r"layers.1.self_attn.q_proj.lora_A.weight: must be in"),
        (dict(lora_bias=True), "lora_B.bias in .*got another name"),
        (dict(init_lora_weights="pissa"), "init_lora_weights must be"),
        (dict(init_lora_weights="olora"), "init_lora_weights must be"),
    ],
)
def test_peft_adapters_that_are_not_plain_lora(base, options, message, reload_gemma, tmp_path):
    folder, cfg, _ = base
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options)
    peft.get_peft_model(reload_gemma(folder), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "adapter", cfg)


def test_merged_and_saved_here_is_merged_in_peft(
    base, reload_gemma, their_logits, padded_tokens, tmp_path
):
    """The two exports of a run agree: merged weights in transformers, the adapter in PEFT."""
    folder, cfg, params = base
    lora = random_lora(cfg, TARGETS)
    save_peft(tmp_path / "adapter", cfg, lora, str(folder))
    save_pretrained(tmp_path / "merged", cfg, merge(params, lora))
    tokens, start, real = padded_tokens(cfg.vocab_size)
    adapted = peft.PeftModel.from_pretrained(reload_gemma(folder), tmp_path / "adapter").eval()
    merged = reload_gemma(tmp_path / "merged")
    off = distance(
        their_logits(merged, tokens, start).detach().numpy(),
        their_logits(adapted, tokens, start),
        real,
    )
    assert off < LOGIT_ATOL
