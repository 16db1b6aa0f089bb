"""How weights become low-bit codes."""
