"""Soft targets and their codecs: logits to small arrays and back. Torch; knows nothing of files or datasets."""
