"""Where a model framework's MLA peculiarities are translated: one seam, and one module per framework on top of it.

Importing this package imports nothing else, and nothing here patches anything at import.
"""
