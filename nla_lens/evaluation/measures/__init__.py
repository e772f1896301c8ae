"""The measures, cheap ones first; each takes a sample and gives rows with their controls."""
