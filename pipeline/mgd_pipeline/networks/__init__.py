"""Segmentation networks, their weights, and how they run over an image."""

from mgd_pipeline.networks.normalisation import IMAGENET, Normalisation

__all__ = ["IMAGENET", "Normalisation"]
