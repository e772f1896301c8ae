"""A transformers model in memory: loading it, its parts, its tokens, reading one block."""
