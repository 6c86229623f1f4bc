"""multidistill: distil a large multimodal teacher into a small, exported, reported student."""

__version__ = "0.1.0"
