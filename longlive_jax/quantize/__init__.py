"""Inference in 8 bits: recipes, the quantised transformer, quantised checkpoints, error tables."""
