"""Small models of transformers with random weights."""
