"""Text and token ids: the tokenizer, its files, rows of ids made into batches."""
