"""The room of `mla::read_rows`: rows of a pool of pages come back as plain numbers."""
