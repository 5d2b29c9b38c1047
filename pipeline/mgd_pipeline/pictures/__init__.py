"""Pictures of masks and figures."""
