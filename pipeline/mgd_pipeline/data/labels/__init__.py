"""Labels as annotation tools write them, read into regions and drawn into masks of class ids."""
