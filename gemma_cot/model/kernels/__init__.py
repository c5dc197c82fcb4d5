"""Pallas TPU kernels, chosen by --attention=pallas and --logprob=pallas, and the plain references
that they equal."""
