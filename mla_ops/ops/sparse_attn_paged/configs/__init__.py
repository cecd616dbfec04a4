"""Launch configurations of the portable kernel on quantised rows, and how rows are cut into pieces."""
