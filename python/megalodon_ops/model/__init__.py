"""The model: configuration, layers, blocks, model, decoder, and files of weights."""
