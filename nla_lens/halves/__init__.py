"""The two halves: the verbalizer, vectors to texts, and the reconstructor, texts to vectors."""
