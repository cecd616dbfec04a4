"""Launch configurations as tables, and the one rule that picks a row."""
