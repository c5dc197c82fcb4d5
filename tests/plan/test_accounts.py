"""Collectives read from a program's text, and memory by owner, on programs compiled here."""

import jax
import pytest

from gemma_cot.plan.accounts import OWNERS, collectives, owners, tree_bytes
from gemma_cot.plan.fit import beside, needs
from gemma_cot.plan.programs import FUNCTIONS, call_of, compile_call

TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: f32[4]) -> f32[4] {
  ROOT %all-reduce.7 = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%unused (p: f32[4]) -> f32[4] {
  ROOT %all-to-all.1 = f32[4]{0} all-to-all(%p), dimensions={0}
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %called = f32[4]{0} call(%x), to_apply=%inner
  %ag = f32[8]{0} all-gather(%x), dimensions={0}
}

%condition (t: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%branch.1 (p: f32[4]) -> f32[4] {
  %permute = (f32[4]{0}, f32[4]{0}) collective-permute-start(%p), source_target_pairs={{0,1}}
  ROOT %done = f32[4]{0} collective-permute-done(%permute)
}

%branch.2 (p: f32[4]) -> f32[4] {
  ROOT %scattered = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %start = ((f32[4]{0}), f32[8]{0}) all-gather-start(%x), dimensions={0}
  %gathered = f32[8]{0} all-gather-done(%start)
  %loop = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body
  %chosen = f32[4]{0} conditional(%i, %x, %x), branch_computations={%branch.1, %branch.2}
  %all-reduce.9 = (f32[4]{0}, f32[]) all-reduce(%x, %y), to_apply=%add
  ROOT %out = f32[4]{0} fusion(%all-reduce.9), kind=kLoop, calls=%add
}
"""


def test_collectives_are_counted_where_the_program_reaches_them():
    assert collectives(TEXT) == {
        "all-reduce": (2, 1),  # one in the loop, through a call
        "all-gather": (2, 1),  # the asynchronous one is one, not two
        "reduce-scatter": (1, 0),
        "collective-permute": (1, 0),
    }


@pytest.fixture(scope="module")
def programs():
    return {}


def compiled(programs, setup, name):
    key = (name, setup.mesh, setup.cfg)
    if key not in programs:
        programs[key] = compile_call(setup, call_of(name, setup))
    return programs[key]


def test_data_parallel_the_update_sums_gradients_once_and_nothing_else_communicates(
    make_setup, programs
):
    setup = make_setup()
    assert setup.micro_batches == 2, "the sum comes after the loop over micro-batches"
    for name in FUNCTIONS:
        found = collectives(compiled(programs, setup, name).text)
        if name in ("update", "sft"):
            assert set(found) == {"all-reduce"} and found["all-reduce"][1] == 0
        else:
            assert found == {}, name


def test_a_cut_model_communicates_in_its_layers(make_setup, programs):
    setup = make_setup(2, 2)
    assert collectives(compiled(programs, setup, "decode").text)["all-reduce"][1] > 0
    update = collectives(compiled(programs, setup, "update").text)
    assert update["all-gather"] == (7, 0), "a gradient of each of 7 targets, no moment of Adam's"


def test_owners_add_up_to_what_xla_says(make_setup, programs):
    setup = make_setup()
    for name in FUNCTIONS:
        program = compiled(programs, setup, name)
        held = owners(setup, name, program)
        assert set(held) <= set(OWNERS)
        assert sum(held.values()) == pytest.approx(program.total)
        assert all(size >= 0 for size in held.values()), (name, held)
        assert held["weights"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(setup.params))
    adapter = 4 * sum(leaf.size for leaf in jax.tree.leaves(setup.state.lora))
    update = owners(setup, "update", compiled(programs, setup, "update"))
    assert update["adapter + optimiser"] == pytest.approx(3 * adapter, abs=16)  # Adam's two moments
    decode = owners(setup, "decode", compiled(programs, setup, "decode"))
    assert decode["adapter + optimiser"] == adapter
    # a device: 2 prompts of 16 tokens, 4 completions of 7; 3 layers, 2 heads of 8, keys and values
    assert decode["KV cache"] == (2 * 16 + 4 * 7) * 3 * 2 * 2 * 8 * 4


def test_what_is_kept_beside_a_function(make_setup, programs):
    setup = make_setup()
    some = {name: compiled(programs, setup, name) for name in ("decode", "update")}
    adapter = tree_bytes(setup.state.lora)
    moments = tree_bytes(setup.state) - adapter
    gap = beside(setup, "decode", some) - beside(setup, "update", some)
    assert gap == pytest.approx(moments)
    needed = needs(setup, some)
    assert needed["update"] == some["update"].total + beside(setup, "update", some)
    assert needed["update"] - some["update"].total > adapter, "the reference adapter, the rollout"
