"""Write data/golden.npz with transformers: python tests/golden/make_tiny_golden.py

Tokens, first real columns and float32 logits of the embedded tiny model, two rows, one left-padded:
what `python -m gemma_cot.doctor` compares an installation with.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import Gemma3ForCausalLM

DATA = Path(__file__).resolve().parents[2] / "data"
START = np.array([0, 7], np.int32)  # first real column of each row
NUM_COLUMNS = 20


def main() -> None:
    """Compute and write the file."""
    model = Gemma3ForCausalLM.from_pretrained(
        DATA / "tiny_model", dtype=torch.float32, attn_implementation="eager"
    )
    column = np.arange(NUM_COLUMNS)[None, :]
    real = column >= START[:, None]
    drawn = np.random.default_rng(0).integers(107, model.config.vocab_size, real.shape)
    tokens = np.where(real, drawn, 0).astype(np.int32)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(real).long(),
            position_ids=torch.tensor(np.maximum(column - START[:, None], 0)).long(),
        ).logits
    np.savez_compressed(
        DATA / "golden.npz",
        tokens_BT=tokens,
        start_B=START,
        logits_BTV=np.where(real[..., None], logits.numpy(), 0).astype(np.float32),
    )


if __name__ == "__main__":
    main()
