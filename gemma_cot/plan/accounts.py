"""What a compiled program says: the collectives it holds, and whose its memory is.

Totals are XLA's. Owners are counted from shapes, in the order of OWNERS; what is left of the
temporaries is called by that name, so that owners add up to the total.
"""

import re
from collections import Counter

import jax

from gemma_cot.axes import RULES
from gemma_cot.grpo.step import shared_rows
from gemma_cot.model.logprob import chunk_of
from gemma_cot.plan.cost import F32, Rows, Share
from gemma_cot.plan.programs import Program, Setup, chip_bytes

OWNERS = (
    "weights", "adapter + optimiser", "batch", "KV cache", "gradients", "activations", "logits",
    "temporaries",
)  # fmt: skip
KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\(")
_LOOP = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation|branch_computations)=\{?%?([\w.\-, %]+)"
)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Return {kind: (number in the program, number inside its loops)} of a compiled program's text.

    Each is counted once, however often it runs.
    """
    found, loops, calls, entry, name = {}, {}, {}, "", ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            name = header[2]
            entry = name if header[1] else entry
            found[name], loops[name], calls[name] = Counter(), set(), set()
        elif name:
            found[name].update(_COLLECTIVE.findall(line))
            loops[name].update(_LOOP.findall(line))
            for names in _CALLED.findall(line):
                calls[name].update(re.findall(r"[\w.\-]+", names))

    reached: dict[str, bool] = {}  # computation -> whether it runs inside a loop
    waiting = [(entry, False)]
    while waiting:
        name, inside = waiting.pop()
        if name not in found or reached.get(name, False) or reached.get(name) == inside:
            continue
        reached[name] = inside
        waiting += [(other, True) for other in loops[name]]
        waiting += [(other, inside) for other in calls[name]]
    total, looped = Counter(), Counter()
    for name, inside in reached.items():
        total += found[name]
        looped += found[name] if inside else Counter()
    return {kind: (total[kind], looped[kind]) for kind in KINDS if total[kind]}


def share_of(setup: Setup) -> Share:
    """Return what a chip of the setup's mesh has of its model."""
    item = jax.numpy.dtype(setup.dtype).itemsize
    shape = setup.mesh.shape
    return Share(setup.model_cfg, setup.cfg.lora_rank, shape["data"], shape["model"], item)


def micro_batch(setup: Setup, name: str) -> tuple[Rows, int]:
    """Return (a chip's micro-batch in "update", "reference_logprobs", "sft"; how many of them)."""
    cfg, width = setup.cfg, setup.width
    if name == "sft":
        rows = cfg.sft_batch // cfg.sft_micro_batches // setup.data
        return Rows(rows, width, setup.sft_width), cfg.sft_micro_batches
    group = shared_rows(setup.model_cfg, cfg)
    return Rows(cfg.micro_batch, width, cfg.max_completion_tokens, group), setup.micro_batches


def tree_bytes(tree) -> float:
    """Return the bytes that one chip holds of a tree of abstract arrays."""
    return sum(chip_bytes(leaf) for leaf in jax.tree.leaves(tree))


def owners(setup: Setup, name: str, program: Program) -> dict[str, float]:
    """Return {owner: bytes on one chip} of a function's memory; the sum is the program's total."""
    adapter = setup.state if name in ("update", "sft") else setup.state.lora
    held = {"weights": tree_bytes(setup.params), "adapter + optimiser": tree_bytes(adapter)}
    held["batch"] = program.arguments - sum(held.values())
    if not program.compiled:
        return held | {"temporaries": program.temporaries}
    left = program.total - program.arguments
    for owner, wanted in inside(setup, name).items():
        held[owner] = min(wanted, left)
        left -= held[owner]
    return held | {"temporaries": left}


def inside(setup: Setup, name: str) -> dict[str, float]:
    """Return bytes by owner of what a function makes while it runs, from shapes."""
    s, cfg, shape = share_of(setup), setup.cfg, setup.model_cfg
    L, D = shape.num_layers, shape.embed_dim
    logits = F32 * shape.vocab_size / (s.model if RULES.get("V") == "model" else 1)
    if name in ("prefill", "decode", "evaluate"):
        prompts = (setup.eval_size[0] if name == "evaluate" else cfg.prompts_per_rollout) // s.data
        cache = prompts * setup.width * s.cache_token
        rows = prompts
        if name != "prefill":
            rows = setup.slots(name)
            group = cfg.num_generations if name == "decode" else 1
            own = rows * setup.width * s.cache_token if rows < prompts * group else 0
            cache += rows * cfg.max_completion_tokens * s.cache_token + own
        hidden = prompts * setup.width * D * s.item
        return {"KV cache": cache, "activations": hidden, "logits": rows * logits}
    batch, micro = micro_batch(setup, name)
    saved = batch.tokens * D * s.item
    gradients = 0.0
    if name != "reference_logprobs":
        saved = L * batch.tokens * s.item * kept_width(setup)
        gradients = s.whole_adapter * (s.item + (F32 if micro > 1 else 0))
    chunk = min(chunk_of(shape, batch.rows), batch.completion)
    chunked = batch.rows * chunk * logits if shape.logprob == "reference" else 0.0
    return {"gradients": gradients, "activations": saved, "logits": chunked}


def kept_width(setup: Setup) -> float:
    """Return the numbers a token that a layer keeps for its backward pass, by --remat."""
    shape, rank, model = setup.model_cfg, setup.cfg.lora_rank, setup.mesh.shape["model"]
    D, F = shape.embed_dim, shape.mlp_dim / model
    heads = shape.num_heads / model * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    products = 2 * heads + 2 * keys + 2 * F + 2 * D + 7 * rank  # q, mix, k, v, gate, up, o, down, z
    elementwise = 4 * D + F  # what norms and the activation hand on
    kept = {"none": products + elementwise, "products": products, "all": 0}
    return D + kept[setup.cfg.remat]
