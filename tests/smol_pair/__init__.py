"""The pair "smol" on its real source model."""
