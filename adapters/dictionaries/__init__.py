"""Sparse dictionaries: their formats, what the AV says of latents, residuals in two languages."""
