"""Engines in this process: transformers, TransformerLens, nnsight, and their decoding."""
