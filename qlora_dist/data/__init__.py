"""From data sets to batches: sources, row formats, chat templates, loss masks, packing, the data loader.

Nothing here depends on a model or on `torch.distributed`: a rank and a world size are plain numbers.
"""
