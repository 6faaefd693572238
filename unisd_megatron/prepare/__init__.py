"""What is computed once before training, by a model: negatives, instructions, embeddings; and the caches they are kept in."""
