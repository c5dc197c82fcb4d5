"""Pallas TPU kernels, and the plain references they equal; nothing in the model calls them yet."""
