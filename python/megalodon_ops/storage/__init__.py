"""Models on disk: folders, files of weights, the released code's format."""
