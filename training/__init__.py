"""Trains ``tiny``, the FastVLM that ships with the package, from scratch on pictures drawn on the fly."""
