"""The Triton backend: kernel sets that are asked in order, and launchers that plan once for calls alike."""
