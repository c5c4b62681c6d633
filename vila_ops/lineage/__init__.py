"""Where an artifact comes from, and what needs it."""
