"""Shapes and values at which cema and timestep_norm lose digits most easily."""

# Ranges of |q| and of its angle. Sequences keep a state for long at |q| = 1, and lose it at once at |q| = 0.
HARD_POLES = {
    "near-one": {"radius": (1 - 1e-5, 1 - 1e-5), "angle": (-3.1, 3.1)},
    "near-one-no-phase": {"radius": (1 - 1e-5, 1 - 1e-5), "angle": (0.0, 0.0)},
    "near-one-slow-phase": {"radius": (1 - 1e-5, 1 - 1e-5), "angle": (1e-5, 1e-4)},
    "on-the-circle": {"radius": (1.0, 1.0), "angle": (-3.1, 3.1)},
    "all-decays": {"radius": (1e-3, 0.999), "angle": (-3.1, 3.1)},
    "no-memory": {"radius": (0.0, 0.0), "angle": (0.0, 0.0)},
}

HARD_SHAPES = {"long": {"B": 1, "L": 1100, "D": 3, "N": 16}, "odd": {"B": 2, "L": 257, "D": 33, "N": 5}}

# Distribution of timestep_norm's input; `count`: positions in the initial state
HARD_VALUES = {
    "mean-1e4-std-1e-2": {"mean": 1e4, "std": 1e-2},
    "mean-1e4-std-1e-2-no-eps": {"mean": 1e4, "std": 1e-2, "eps": 0.0},
    "mean-1e6-std-1": {"mean": -1e6, "std": 1.0},
    "tiny": {"mean": 0.0, "std": 1e-4},
    "huge": {"mean": 1e12, "std": 1e12},
    "old-state": {"mean": 1e4, "std": 1e-2, "count": 10**6},
}

SHAPES = {  # of timestep_norm; width: channels of a group
    "long": {"B": 1, "L": 1100, "G": 2, "width": 8},
    "odd": {"B": 2, "L": 67, "G": 3, "width": 17},
    "width-of-the-presets": {"B": 1, "L": 30, "G": 5, "width": 32},
    "wide": {"B": 1, "L": 20, "G": 2, "width": 128},
}
