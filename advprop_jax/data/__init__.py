"""Records in, batches of uint8 images out."""
