"""Studies: many runs over shared teachers and caches."""
