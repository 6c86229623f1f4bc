"""What prints the figures that the project claims; run from a checkout, for instance ``python -m benchmarks.NAME``."""
