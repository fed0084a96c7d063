"""From any source to batches: rows of one schema, checked, shuffled by image and collated."""
