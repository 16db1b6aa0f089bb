"""The three kernel families as torch operators."""
