"""Sparse autoencoders with Adaptive Temporal Masking, and an exact test of feature absorption."""

__version__ = "0.1.0"
