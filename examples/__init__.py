"""Bottlenecks on real data: images, text, recommendations. Run one with ``python -m examples.image``."""
