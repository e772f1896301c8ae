"""Verbalizers on a vLLM or SGLang server that is sent prompt embeddings."""

from nla_lens.engines.served.server import Server

__all__ = ["Server"]
