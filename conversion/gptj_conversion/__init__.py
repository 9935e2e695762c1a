"""Converters between GPT-J formats: core, NumPy and ml_dtypes only, never a framework."""
