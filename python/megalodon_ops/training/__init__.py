"""What a training program needs around the model; needs the extra `train`."""

from .checkpoint import Checkpoint, load_any, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "load_any", "load_checkpoint", "save_checkpoint"]
