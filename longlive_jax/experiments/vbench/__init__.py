"""VBench: what to sample, sampling it under the names the scorer expects, and reading its results.

The scorer itself is PyTorch with weights from several hubs; it is installed and run apart
(docs/experiments.md). `prompts` reads its prompt list and says which files it will look for, `sampling` makes
them, `scores` reads its result files and computes the totals.
"""
