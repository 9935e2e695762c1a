"""transformers' weight files: safetensors of three dialects, .bin, .msgpack and .h5."""
