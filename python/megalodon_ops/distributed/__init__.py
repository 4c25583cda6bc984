"""Training and evaluation on several processes, by torch.distributed: the batch and the sequence split over ranks."""
