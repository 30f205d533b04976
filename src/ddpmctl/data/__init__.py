"""Images from a folder or ``.zip`` to batches: scan -> survey -> decode -> dataset -> batches.

Only ``dataset`` and ``batches`` import torch, so that data can be inspected without it.
"""
