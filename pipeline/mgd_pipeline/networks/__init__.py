"""Segmentation networks, their weights, and how they run over an image."""
