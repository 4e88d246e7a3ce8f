"""A toy plugin package; see specs."""
