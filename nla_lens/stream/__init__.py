"""Residual vectors: where they come from, how layers are numbered, how one is injected."""
