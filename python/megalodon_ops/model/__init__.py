"""The model: configuration, layers, blocks, the whole, its decoder, and files of weights."""
