"""Launch configurations as tables, a row of a user, and the one rule that picks a row."""
