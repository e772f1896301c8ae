"""Halves and source models on an NDIF server, by remote nnsight."""

from nla_lens.engines.ndif.engine import Server

__all__ = ["Server"]
