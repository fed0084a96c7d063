"""Data wing: read rows from any source, convert and check them, choose splits, shuffle, and build batches."""
