"""Is an exported model the same in llama.cpp? Its converter, its tokenizer, its greedy tokens.

    pip download --no-deps llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz &&
        CMAKE_ARGS=-DLLAVA_BUILD=OFF pip install ./llama_cpp_python-0.3.36
    python tests/gguf_check.py --model=runs/tiny/merged \\
        --llama_cpp=llama_cpp_python-0.3.36/vendor/llama.cpp

The first command compiles llama.cpp (a C++ compiler; 3 minutes on 2 cores); the converter needs the
extra `interop` too. Weights, cache and sums are float32 on both sides, but llama.cpp looks GELU up
in a float16 table: most of the 8e-3 by which logits differ. Exit code 1 when a token differs.
"""

import argparse
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import jax
import llama_cpp
import numpy as np

from gemma_cot.config import embedded
from gemma_cot.data import left_pad, read_jsonl
from gemma_cot.model.gemma import logits
from gemma_cot.model.load import load_pretrained
from gemma_cot.model.sample import sample
from gemma_cot.tokenizer import encode_prompt, load_tokenizer, render_turns

NUM_PROMPTS, NUM_TOKENS = 12, 128


def convert(model: Path, llama_cpp_dir: Path, file: Path) -> None:
    """Write `file` with llama.cpp's convert_hf_to_gguf.py, all weights in float32."""
    script = llama_cpp_dir / "convert_hf_to_gguf.py"
    command = [sys.executable, script, model, "--outtype", "f32", "--outfile", file]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr}")


def questions(tokenizer, window: int) -> list[str]:
    """Return evaluation questions, and one prompt of many that is longer than the window."""
    rows = [row.prompt for row in read_jsonl(embedded("eval.jsonl"))[0]]
    count = NUM_PROMPTS
    while len(encode_prompt(tokenizer, "\n\n".join(rows[:count]))) <= window + 50:
        count += 1
    return [*rows[:NUM_PROMPTS], "\n\n".join(rows[:count])]


def our_answer(params, cfg, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """Return (NUM_TOKENS greedy tokens, whatever they are; logits of the prompt [T, V])."""
    width = 64 * -(-len(ids) // 64)  # few widths, few compilations
    tokens, start = left_pad([ids], width)
    out = sample(
        params, cfg, tokens, start, jax.random.key(0), num_completions=1, temperature=0.0,
        max_new_tokens=NUM_TOKENS, stop_ids=(),
    )  # fmt: skip
    run = jax.jit(logits, static_argnames="cfg")(params, cfg, tokens, start)
    return np.asarray(out.tokens_BT)[0, width:].tolist(), np.asarray(run)[0, start[0] :]


def main() -> None:
    """Compare prompt by prompt; print a line each and the sum."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="an exported model folder")
    parser.add_argument("--llama_cpp", type=Path, required=True, help="llama.cpp's source folder")
    options = parser.parse_args()
    cfg, params = load_pretrained(options.model, "float32")
    tokenizer = load_tokenizer(options.model, cfg.vocab_size)
    prompts = questions(tokenizer, cfg.window)
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    with tempfile.TemporaryDirectory() as folder:
        convert(options.model, options.llama_cpp, Path(folder) / "model.gguf")
        llama = llama_cpp.Llama(
            f"{folder}/model.gguf", n_ctx=longest + NUM_TOKENS, logits_all=True, verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        )  # fmt: skip
    same, largest, spelled = 0, 0.0, 0
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        spelled += llama.tokenize(render_turns(prompt).encode(), special=True) == ids
        theirs = list(islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0), NUM_TOKENS))
        ours, prompt_logits = our_answer(params, cfg, ids)
        alike = next((i for i in range(NUM_TOKENS) if ours[i] != theirs[i]), NUM_TOKENS)
        off = np.abs(llama.scores[: len(ids)] - prompt_logits).max()
        print(f"prompt of {len(ids)} tokens: {alike} of {NUM_TOKENS} the same, logits {off:.1e}")
        same, largest = same + alike, max(largest, off)
    llama.close()
    count = len(prompts)
    print(
        f"{same} of {NUM_TOKENS * count} greedy tokens the same, {spelled} of {count} prompts "
        f"split alike, largest difference of a logit {largest:.1e}"
    )
    sys.exit(same < NUM_TOKENS * count or spelled < count)


if __name__ == "__main__":
    main()
