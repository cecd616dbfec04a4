"""The Triton backend: launchers that plan once for calls alike, allocate from shapes and never synchronise."""
