"""NumPy twins: every formula of the package again, in float64 and plain loops, for the tests.

Written from the papers and from Gemma 3's published description, one token and one head at a time,
without a mask, a batch or a scan; so a mistake in a mask, a transposed axis or a wrong position
shows. Imports nothing from the package; knows no JAX.
"""

import math

import numpy as np

# --------------------------------------------------------------------------------------------
# Gemma 3 forward pass, one row without padding
# --------------------------------------------------------------------------------------------


def reference_logits(params, cfg, tokens_T, lora=None, scale: float = 0.0) -> np.ndarray:
    """Return `logits_TV` of one row: the scores of the token after each token.

    lora: {target: {"a", "b"}} with the layer axis in front, or None; scale: alpha / rank.
    """
    table_VD = np.asarray(params["embed"], np.float64)
    x_TD = table_VD[np.asarray(tokens_T)] * math.sqrt(cfg.embed_dim)
    for i in range(cfg.num_layers):
        layer = {name: np.asarray(w[i], np.float64) for name, w in params["layers"].items()}
        for name, ab in (lora or {}).items():
            layer[name] = layer[name] + scale * low_rank_product(
                ab["a"][i], ab["b"][i], layer[name].shape
            )
        x_TD = x_TD + reference_attention(x_TD, layer, cfg, cfg.global_layers[i])
        x_TD = x_TD + reference_mlp(x_TD, layer, cfg.norm_eps)
    final_w = np.asarray(params["final_norm"], np.float64)
    return np.stack([table_VD @ reference_norm(x_D, final_w, cfg.norm_eps) for x_D in x_TD])


def low_rank_product(a, b, shape) -> np.ndarray:
    """Return A B as one weight of `shape`: both factors flattened to matrices through the rank."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    rank = a.shape[-1]
    return (a.reshape(-1, rank) @ b.reshape(rank, -1)).reshape(shape)


def reference_norm(x, w, eps: float) -> np.ndarray:
    """Return x / sqrt(mean(x²) + eps) · (1 + w) of one vector."""
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * (1.0 + w)


def reference_rope(x_H, position: float, base: float) -> np.ndarray:
    """Rotate the plane (x_j, x_{j+H/2}) by the angle position · base^(-2j/H), for every j."""
    half = len(x_H) // 2
    out = np.empty(len(x_H))
    for j in range(half):
        turn = np.exp(1j * position * base ** (-2.0 * j / len(x_H)))
        z = (x_H[j] + 1j * x_H[j + half]) * turn
        out[j], out[j + half] = z.real, z.imag
    return out


def reference_attention(x_TD, layer, cfg, is_global: bool) -> np.ndarray:
    """Return what one attention sub-layer adds to the residual stream, both its norms included."""
    base = cfg.rope_base_global if is_global else cfg.rope_base_local
    slower = cfg.rope_scale_global if is_global else 1.0
    window = len(x_TD) if is_global else cfg.window
    group = cfg.num_heads // cfg.num_kv_heads
    out_TD, keys, values = [], [], []
    for t, x_D in enumerate(x_TD):
        h_D = reference_norm(x_D, layer["pre_attn_norm"], cfg.norm_eps)
        k_KH = [h_D @ layer["k"][:, k, :] for k in range(cfg.num_kv_heads)]
        k_KH = [reference_norm(k_H, layer["k_norm"], cfg.norm_eps) for k_H in k_KH]
        keys.append([reference_rope(k_H, t / slower, base) for k_H in k_KH])
        values.append([h_D @ layer["v"][:, k, :] for k in range(cfg.num_kv_heads)])
        seen = range(max(0, t - window + 1), t + 1)  # `window` positions, this one included
        out_D = np.zeros(cfg.embed_dim)
        for n in range(cfg.num_heads):
            q_H = reference_norm(h_D @ layer["q"][:, n, :], layer["q_norm"], cfg.norm_eps)
            q_H = reference_rope(q_H, t / slower, base) / math.sqrt(cfg.query_scalar)
            weights = reference_softmax([float(q_H @ keys[s][n // group]) for s in seen])
            mix_H = sum(w * values[s][n // group] for w, s in zip(weights, seen, strict=True))
            out_D = out_D + mix_H @ layer["o"][n]
        out_TD.append(reference_norm(out_D, layer["post_attn_norm"], cfg.norm_eps))
    return np.stack(out_TD)


def reference_mlp(x_TD, layer, eps: float) -> np.ndarray:
    """Return what one MLP sub-layer adds to the residual stream, both its norms included."""
    out_TD = []
    for x_D in x_TD:
        h_D = reference_norm(x_D, layer["pre_mlp_norm"], eps)
        gate_F = np.array([reference_gelu(g) for g in h_D @ layer["gate"]])
        out_D = (gate_F * (h_D @ layer["up"])) @ layer["down"]
        out_TD.append(reference_norm(out_D, layer["post_mlp_norm"], eps))
    return np.stack(out_TD)


def reference_gelu(x: float) -> float:
    """Return GELU by its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def reference_softmax(scores) -> list[float]:
    """Return exp(s) / Σ exp(s), shifted by the largest score."""
    top = max(scores)
    raised = [math.exp(s - top) for s in scores]
    return [r / sum(raised) for r in raised]


def reference_logprobs(logits_TV, tokens_T, temperature: float = 1.0) -> np.ndarray:
    """Return `logp_T`: log p(token t | tokens before t); 0 at t = 0, which nothing predicts."""
    out = np.zeros(len(tokens_T))
    for t in range(1, len(tokens_T)):
        probability = reference_softmax(list(np.asarray(logits_TV[t - 1]) / temperature))
        out[t] = math.log(probability[int(tokens_T[t])])
    return out
