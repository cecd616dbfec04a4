"""Frameworks' views of the operator; nothing here is imported by the library itself."""
