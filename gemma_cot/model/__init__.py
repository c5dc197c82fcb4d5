"""Gemma 3 in plain functions; read params, load, layers, gemma, cache, logprob, sample."""
