"""Halves and source models on an NDIF server, by remote nnsight."""

from nla_lens.engines.ndif.server import Server

__all__ = ["Server"]
