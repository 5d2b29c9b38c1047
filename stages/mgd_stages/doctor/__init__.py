"""`mgd-pipeline doctor`: what is wrong is named before it costs time."""
