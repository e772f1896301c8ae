"""Long runs that lose nothing: corpora in, stores of explanations out."""
