"""Projects: how they begin, and the files that describe them."""
