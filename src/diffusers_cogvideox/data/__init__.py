"""Data for training and evaluation. Import from the modules: `moving_shapes` (endless clips), `captions`, `scenes`, `rendering`."""
