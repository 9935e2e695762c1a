"""Reading: files, the names and paths in them, weights and manifests, strictly, before anything is believed."""
