"""The room of `mla::attn_mass`: how much attention all heads together give to the keys that a list names."""
