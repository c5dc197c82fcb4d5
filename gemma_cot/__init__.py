"""GRPO for Gemma 3 in pure JAX: from a line of JSON to a gradient.

The order to read it in, in which no file uses what comes after it:

    settings    hosts axes hf_config config metrics settings
    rows        grpo.answer grpo.reward tokenizer data
    model       model.params model.load model.kernels.gradients model.layers model.kernels.tiles
                model.kernels.prefill model.gemma model.kernels.logprob model.logprob
                model.kernels.layout model.kernels.decode model.cache model.sample
    training    lora.lora lora.peft optim sft grpo.loss grpo.rollout grpo.step grpo.reserve
    the run     guard.user guard.corpus guard.canaries guard.jail guard.sandbox guard.symbolic
                rewards checkpoint policy resume session results run turn
    the end     stats scores progress evaluation alarms curves environment profiling traces cli
                train

What is not there stands beside it: the other commands, prepare, distill, serve, plan, report,
testing and tasks. A reader of GRPO alone skips model.load, lora.peft, guard and the kernels.
"""
