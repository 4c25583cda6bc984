"""Training and evaluation on several processes, by torch.distributed: the batch and the sequence split over ranks."""

from .mesh import make_mesh
from .parallel_model import ParallelMegalodon, ParallelMegalodonEncoder
from .parallelize import parallelize
from .split import split

__all__ = ["ParallelMegalodon", "ParallelMegalodonEncoder", "make_mesh", "parallelize", "split"]
