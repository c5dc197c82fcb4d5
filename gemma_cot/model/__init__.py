"""Gemma 3 in plain functions: params, load, layers, gemma, cache, logprob, sample, in that order."""
