"""Writing checkpoints: an output directory as a whole, weights tensor by tensor, a journal to go on from."""
