"""GRPO for Gemma 3; read in this order: answer, reward, loss, rollout, step."""
