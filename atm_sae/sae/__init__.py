"""Sparse autoencoders, their losses, the mask, and foreign formats."""
