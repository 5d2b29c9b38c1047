"""Data sets: how images and masks are read, drawn into splits and written down in a manifest."""
