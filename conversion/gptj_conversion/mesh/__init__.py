"""mesh-transformer-jax's TPU checkpoints: folders and archives, read and written."""
