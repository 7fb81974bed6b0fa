"""Exports, recomputed by interpreters that share nothing with what writes them."""
