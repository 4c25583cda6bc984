"""The paper: configuration, layers, blocks, the model, the encoder, their inputs, sequences and states."""
