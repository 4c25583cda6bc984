"""Inference: decoder, generation, drafts, sampling, weights of 8 and 4 bits."""
